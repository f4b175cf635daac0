// SPDX-License-Identifier: Apache-2.0
//
// What the tests of the plumbing (linear, norms, rope, ...) share: one step on three backends.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "infllm/backend/reference/rounding.h"
#include "infllm/ops/kernels.h"
#include "tests/support/budget.h"
#include "tests/support/rig.h"

namespace infllm::testing {

// A backend with the numbers of one check on it, rounded to what the backend under test holds.
struct Bench {
  explicit Bench(Backend b) : Bench(b, testing::numbers_type(b)) {}
  Bench(Backend b, DType numbers_type) : backend(std::move(b)), numbers(numbers_type) {}

  Buffer in(std::vector<double> values) const {
    for (double& value : values) value = reference::round_to(numbers, value);
    return upload(backend, values, backend.kernels->activation);
  }
  Buffer floats(const std::vector<float>& values) const {
    const std::vector<double> wide(values.begin(), values.end());
    return upload(backend, wide, DType::kF32);
  }
  std::vector<double> out(const Buffer& buffer, std::size_t count) const {
    return download(backend, buffer, static_cast<std::int64_t>(count), backend.kernels->activation);
  }
  Backend backend;
  DType numbers;
};

class PlumbingTest : public ::testing::TestWithParam<std::string> {
 protected:
  // Runs `step` on the exact reference, on the one that rounds operands to `operand`, and on the
  // backend; holds the latter to the budget.
  template <typename StepFunction>
  void expect_within_budget(const std::string& op, DType operand, std::vector<std::int64_t> shape,
                            StepFunction&& step) {
    const Bench kernel(open(GetParam()));
    const DType activation = kernel.backend.kernels->activation;
    const DType numbers = kernel.numbers;
    Ledger ledger({.op = op, .backend = GetParam(), .dtype = operand, .name = "inline"},
                  Error::kAbsolute, activation);
    const std::vector<double> got = step(kernel);
    const std::vector<double> exact = step(Bench(open("reference"), numbers));
    const std::vector<double> rounded = step(Bench(open_rounded(operand, activation), numbers));
    ledger.add(0, std::move(shape), got, exact, rounded);
    EXPECT_TRUE(ledger.balanced());
  }
};

}  // namespace infllm::testing
