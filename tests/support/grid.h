// SPDX-License-Identifier: Apache-2.0
//
// Every case on every backend that this machine has, with every cache type: what the tests of a
// step are instantiated over.
//
//   TEST_P(ScoreTest, StaysWithinTheBudget) {
//     Trio trio(GetParam());
//     for (const Step& step : trio.steps()) { trio.enter(step); ... }
//   }
//   INSTANTIATE_TEST_SUITE_P(Grid, ScoreTest, ::testing::ValuesIn(grid()), point_name);
#pragma once

#include <gtest/gtest.h>

#include <ostream>
#include <string>
#include <vector>

#include "tests/support/budget.h"
#include "tests/support/rig.h"

namespace infllm::testing {

struct Point {
  std::string backend;
  DType kv = DType::kF32;
  std::string case_name;
};
void PrintTo(const Point& point, std::ostream* out);

// Columns that are tested against the reference; then all of them. Of several equal devices the
// first.
std::vector<std::string> all_backends();
std::vector<std::string> kernel_backends();
// The types in which a backend keeps caches, the most exact first.
std::vector<DType> cache_types(const std::string& backend);
std::vector<Point> grid();
// The reference too, for what every column must hold to by itself.
std::vector<Point> whole_grid();
// "cpu_avx2_bf16_edges_prefill".
std::string point_name(const ::testing::TestParamInfo<Point>& info);
// The same of a backend's name.
std::string backend_id(const ::testing::TestParamInfo<std::string>& info);

Label label_of(const Point& point, std::string op);

// The kernel under test, the exact reference and the rounded one, in lockstep on one case. Scores
// of the two references are not rounded: that rounding is the ulp of the budget.
struct Trio {
  explicit Trio(const Point& point);
  // The references take over the kernel's pooled keys, whose errors are compress's and not the next
  // step's.
  void enter(const Step& step);
  const std::vector<Step>& steps() const { return kernel.test_case().steps; }

  Rig kernel;
  Rig exact;
  Rig rounded;
};

// Rows [Hkv, T, width] or [T, Hq, width] without those of dense sequences, which steps leave alone.
std::vector<double> sparse_rows(const Rig& rig, const std::vector<double>& rows,
                                std::int64_t width);

// Judges a selection by value. Against the exact scores, every chosen block must be at least as
// good as every block that was left out, give or take the score's budget for both; forced blocks
// first; ascending, unique, causal, as many as fit, -1 behind them.
::testing::AssertionResult well_chosen(const Rig& rig, const std::vector<std::int32_t>& selection,
                                       const std::vector<double>& exact_scores,
                                       double relative_budget, DType stored, const Label& label);

// Why the backend cannot hold the case's cache; empty: it can.
std::string layout_refusal(const Point& point);

}  // namespace infllm::testing

// A column that lacks a step, or has no cache of a case's shape, says so in the test's output.
#define SKIP_WITHOUT(point, cell)                                                     \
  if (::infllm::testing::open((point).backend, 1).kernels->cell.run == nullptr) {     \
    GTEST_SKIP() << (point).backend << " has no " #cell;                              \
  }                                                                                   \
  if (const std::string why = ::infllm::testing::layout_refusal(point); !why.empty()) \
  GTEST_SKIP() << why
