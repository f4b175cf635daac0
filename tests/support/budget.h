// SPDX-License-Identifier: Apache-2.0
//
// The only place where tolerances come from (docs/numerics.md). Three runs of one computation: the
// exact one in double, the same one rounded where an honest kernel rounds, and the kernel under
// test.
//
//   |kernel - exact| <= 2 max |rounded - exact| + 1 ulp          every element
//   rms(kernel - exact) <= 2 rms(rounded - exact) + rms(ulp)     all elements together
//
// The ulp is that of the type in which the result is stored. Where the error is by nature a share
// of the value (scores are exponentials), the first term is 2 |exact| max |rounded / exact - 1|.
//
//   Ledger ledger({.op = "attend", .backend = "cpu:avx2", .kv = DType::kBF16, .name = c.name,
//   ...}); ledger.add(step, {tokens, heads, dim}, got, exact, rounded);
//   EXPECT_TRUE(ledger.balanced());
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "infllm/core/dtype.h"

namespace infllm::testing {

enum class Error { kAbsolute, kRelative };

// What it takes to run one check again.
struct Label {
  std::string op;
  std::string backend;
  DType dtype = DType::kF32;  // of the cache, or of the weights
  std::string name;           // of the case
  std::uint64_t seed = 0;
};

// "score cpu:avx2 bf16 case edges_decode seed 2".
std::string describe(const Label& label);

// The distance from |value| to the next larger number of that type; at least the smallest normal
// number, because a kernel may flush what is below it to zero.
double ulp(double value, DType dtype);

class Ledger {
 public:
  Ledger(Label label, Error error, DType stored)
      : label_(std::move(label)), error_(error), stored_(stored) {}

  // Three arrays of one shape, of one step of the case.
  void add(std::size_t step, std::vector<std::int64_t> shape, std::span<const double> got,
           std::span<const double> exact, std::span<const double> rounded);

  // One line that says where and by how much, if any number is over its budget or not finite where
  // the exact one is.
  ::testing::AssertionResult balanced() const;

  // 2 max |rounded / exact - 1|, for judging selections by value. Of relative ledgers.
  double relative_budget() const;

 private:
  struct Entry {
    double got, exact, rounded;
  };
  struct Part {
    std::size_t step;
    std::vector<std::int64_t> shape;
    std::size_t first;  // entry
  };
  std::string place(std::size_t entry) const;
  double unit(double exact) const;

  Label label_;
  Error error_;
  DType stored_;
  std::vector<Entry> entries_;
  std::vector<Part> parts_;
};

}  // namespace infllm::testing
