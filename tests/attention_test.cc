// SPDX-License-Identifier: Apache-2.0
//
// The steps together, and what holds for attention as a whole.
#include "infllm/ops/attention.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "tests/support/grid.h"
#include "tests/support/refusal.h"

namespace infllm::testing {
namespace {

bool complete(const Backend& backend) {
  const Kernels& k = *backend.kernels;
  return k.compress.run && k.score.run && k.select.run && k.attend.run;
}

#define SKIP_INCOMPLETE(point)                                       \
  if (!complete(open((point).backend, 1))) {                         \
    GTEST_SKIP() << (point).backend << " has not all steps";         \
  }                                                                  \
  if (const std::string why = layout_refusal(point); !why.empty()) { \
    GTEST_SKIP() << why;                                             \
  }                                                                  \
  static_assert(true)

class AttentionTest : public ::testing::TestWithParam<Point> {};

// The reference attends to the blocks that the kernel chose: a near tie in selection, which is
// select's affair, is no error here.
TEST_P(AttentionTest, IsItsStepsAndStaysWithinTheBudget) {
  SKIP_INCOMPLETE(GetParam());
  Trio trio(GetParam());
  const Case& c = trio.kernel.test_case();
  Ledger ledger(label_of(GetParam(), "attention"), Error::kAbsolute,
                trio.kernel.backend().kernels->activation);
  for (std::size_t i = 0; i < trio.steps().size(); ++i) {
    trio.enter(trio.steps()[i]);
    std::vector<std::int32_t> chosen;
    if (trio.kernel.batch().any_sparse) chosen = trio.kernel.choose();
    ledger.add(i, {trio.kernel.tokens(), c.heads_q, c.head_dim}, trio.kernel.attention().o,
               trio.exact.attend(chosen).o, trio.rounded.attend(chosen).o);
  }
  EXPECT_TRUE(ledger.balanced());
}

INSTANTIATE_TEST_SUITE_P(Grid, AttentionTest, ::testing::ValuesIn(grid()), point_name);

class AttentionInvariant : public ::testing::TestWithParam<Point> {};

void expect_same_bits(const Attended& a, const Attended& b, const std::string& what) {
  ASSERT_EQ(a.o.size(), b.o.size()) << what;
  for (std::size_t i = 0; i < a.o.size(); ++i) ASSERT_EQ(a.o[i], b.o[i]) << what << " o " << i;
  for (std::size_t i = 0; i < a.lse.size(); ++i) {
    ASSERT_EQ(a.lse[i], b.lse[i]) << what << " lse " << i;
  }
}

TEST_P(AttentionInvariant, ThreadsChangeNothing) {
  SKIP_INCOMPLETE(GetParam());
  const Case& c = case_named(GetParam().case_name);
  Rig one(open(GetParam().backend, 1), c, GetParam().kv);
  Rig three(open(GetParam().backend, 3), c, GetParam().kv);
  one.enter(c.steps.back());
  three.enter(c.steps.back());
  expect_same_bits(one.attention(), three.attention(), describe(label_of(GetParam(), "threads")));
}

// A sequence is computed alike whoever else is in the batch.
TEST_P(AttentionInvariant, CompanyChangesNothing) {
  SKIP_INCOMPLETE(GetParam());
  if (is_device(open(GetParam().backend, 1))) {
    GTEST_SKIP() << "a device has kernels of its own for steps of one token a sequence";
  }
  const Case& c = case_named(GetParam().case_name);
  const Step& step = c.steps.back();
  Rig together(open(GetParam().backend), c, GetParam().kv);
  together.enter(step);
  const Attended all = together.attention();
  const std::int64_t row = std::int64_t{c.heads_q} * c.head_dim;
  std::int64_t first = 0;
  for (std::size_t s = 0; s < step.size(); ++s) {
    const std::int64_t tokens = step[s].end - step[s].first;
    Step only(step.size(), Span{0, 0});
    only[s] = step[s];
    Rig alone(open(GetParam().backend), c, GetParam().kv);
    alone.enter(only);
    const Attended one = alone.attention();
    Attended cut;
    cut.o.assign(all.o.begin() + first * row, all.o.begin() + (first + tokens) * row);
    for (std::int32_t h = 0; h < c.heads_q; ++h) {
      const auto from = all.lse.begin() + std::int64_t{h} * together.tokens() + first;
      cut.lse.insert(cut.lse.end(), from, from + tokens);
    }
    expect_same_bits(one, cut, describe(label_of(GetParam(), "company")));
    first += tokens;
  }
}

// In a batch of the same shape, which runs the same kernels on devices too, what other sequences
// hold is never seen.
TEST_P(AttentionInvariant, WhatNeighboursHoldChangesNothing) {
  SKIP_INCOMPLETE(GetParam());
  const Case& c = case_named(GetParam().case_name);
  const Step& step = c.steps.back();
  const auto run = [&](auto is_changed) {
    Rig rig(open(GetParam().backend), c, GetParam().kv);
    for (std::size_t s = 0; s < step.size(); ++s) {
      SequenceNumbers& numbers = rig.numbers()[s];
      if (is_changed(s)) {
        for (auto* rows : {&numbers.k, &numbers.v, &numbers.k_score}) {
          for (double& x : *rows) x *= -2;  // in every type without rounding
        }
      }
    }
    rig.enter(step);
    return rig.attention();
  };
  const std::int64_t row = std::int64_t{c.heads_q} * c.head_dim;
  const Attended original = run([](std::size_t) { return false; });
  const std::size_t tokens = original.lse.size() / static_cast<std::size_t>(c.heads_q);
  for (const std::size_t parity : {0u, 1u}) {
    const Attended changed = run([&](std::size_t s) { return s % 2 == parity; });
    std::size_t first = 0;
    for (std::size_t s = 0; s < step.size(); ++s) {
      const auto count = static_cast<std::size_t>(step[s].end - step[s].first);
      const auto part = [&](const Attended& all) {
        Attended cut;
        const auto begin = all.o.begin() + static_cast<std::ptrdiff_t>(first) * row;
        cut.o.assign(begin, begin + static_cast<std::ptrdiff_t>(count) * row);
        for (std::int32_t h = 0; h < c.heads_q; ++h) {
          const auto from = all.lse.begin() + static_cast<std::ptrdiff_t>(h * tokens + first);
          cut.lse.insert(cut.lse.end(), from, from + static_cast<std::ptrdiff_t>(count));
        }
        return cut;
      };
      if (s % 2 != parity) {
        expect_same_bits(part(changed), part(original), describe(label_of(GetParam(), "others")));
      } else if (count > 0) {
        EXPECT_NE(part(changed).o, part(original).o) << "the change must be one";
      }
      first += count;
    }
  }
}

std::vector<Point> invariant_points() {
  std::vector<Point> list;
  for (const Point& p : whole_grid()) {
    for (const char* name : {"edges_prefill", "dense_len_edge", "group_7", "group_16", "use_nope",
                             "taking_turns", "many_blocks"}) {
      if (p.case_name == name) list.push_back(p);
    }
  }
  return list;
}

INSTANTIATE_TEST_SUITE_P(Grid, AttentionInvariant, ::testing::ValuesIn(invariant_points()),
                         point_name);

class AttentionEdge : public ::testing::TestWithParam<std::string> {};

// Logits whose exponentials leave the range of float.
TEST_P(AttentionEdge, HugeLogitsGiveFiniteOutputs) {
  for (const DType kv : cache_types(GetParam())) {
    SKIP_INCOMPLETE((Point{GetParam(), kv, "extreme_logits"}));
    Case c = case_named("extreme_logits");
    Rig rig(open(GetParam()), c, kv);
    for (SequenceNumbers& numbers : rig.numbers()) {
      for (double& k : numbers.k) k *= 64;
    }
    rig.enter(c.steps[0]);
    const std::vector<double> scores = rig.score();
    for (const double score : sparse_rows(rig, scores, rig.blocks())) {
      ASSERT_FALSE(std::isnan(score)) << GetParam();
    }
    const Attended out = rig.attention();
    for (const double o : out.o) ASSERT_TRUE(std::isfinite(o)) << GetParam();
    for (const double lse : out.lse) ASSERT_TRUE(std::isfinite(lse)) << GetParam();
  }
}

// What a device reads and writes through page numbers is checked by it: a sequence whose numbers
// are wrong spoils its own output at most, in every step from appending to attending.
TEST_P(AttentionEdge, CorruptPageTablesHarmNobodyElse) {
  if (!is_device(open(GetParam(), 1))) GTEST_SKIP() << "hosts believe their own plan";
  const DType kv = cache_types(GetParam()).front();
  for (const char* name : {"edges_decode", "edges_prefill", "group_7", "group_16", "many_blocks"}) {
    const Case& c = case_named(name);
    const Step& step = c.steps.back();
    Rig rig(open(GetParam()), c, kv);
    rig.enter(step);
    const Attended want = rig.attention();
    const std::vector<std::int32_t> sound = rig.page_table();
    const auto longest =
        std::max_element(step.begin(), step.end(), [](Span a, Span b) { return a.end < b.end; });
    const std::int64_t broken = longest - step.begin();
    std::int64_t first = 0;
    for (auto span = step.begin(); span != longest; ++span) first += span->end - span->first;
    const std::int64_t last = first + longest->end - longest->first;
    const std::int32_t pages = rig.pages().num_pages;
    for (const std::int32_t id : {-1, -5, pages, 1 << 30, INT32_MIN, INT32_MAX}) {
      for (std::int64_t i = 0; i < rig.batch().max_pages; i += 2) {
        rig.page_table()[broken * rig.batch().max_pages + i] = id;
      }
      rig.upload_page_table();
      rig.enter(step);  // once more: the others write what is there already
      rig.read();
      const Attended got = rig.attention();
      const std::int64_t row = std::int64_t{c.heads_q} * c.head_dim;
      for (std::int64_t i = 0; i < static_cast<std::int64_t>(want.o.size()); ++i) {
        if (i / row >= first && i / row < last) continue;
        ASSERT_EQ(got.o[i], want.o[i]) << name << " page " << id << " token " << i / row;
      }
      rig.page_table() = sound;
    }
    rig.upload_page_table();
    rig.enter(step);
    expect_same_bits(rig.attention(), want, name);
  }
}

// With a budget as long as the sequence, sparse is dense.
TEST_P(AttentionEdge, AllBlocksAreDenseAttention) {
  const DType kv = cache_types(GetParam()).front();
  SKIP_INCOMPLETE((Point{GetParam(), kv, "group_2_dim_128"}));
  Case sparse = case_named("group_2_dim_128");
  sparse.config.topk = 20;
  Case dense = sparse;
  dense.config.dense_len = 1 << 20;
  Rig a(open(GetParam()), sparse, kv);
  Rig b(open(GetParam()), dense, kv);
  const DType numbers = numbers_type(a.backend());
  Rig exact(open("reference"), dense, kv, numbers);
  Rig rounded(open_rounded(numbers, numbers), dense, kv, numbers);
  for (Rig* rig : {&a, &b, &exact, &rounded}) rig->enter(sparse.steps[0]);
  ASSERT_TRUE(a.batch().any_sparse);
  ASSERT_FALSE(b.batch().any_sparse);
  const Attended want = exact.attention();
  const Attended about = rounded.attention();
  for (Rig* rig : {&a, &b}) {
    Ledger ledger({.op = "attention", .backend = GetParam(), .name = "all blocks"},
                  Error::kAbsolute, rig->backend().kernels->activation);
    ledger.add(0, {a.tokens(), sparse.heads_q, sparse.head_dim}, rig->attention().o, want.o,
               about.o);
    EXPECT_TRUE(ledger.balanced());
  }
}

TEST_P(AttentionEdge, TimesItsStepsWhenAsked) {
  const DType kv = cache_types(GetParam()).front();
  SKIP_INCOMPLETE((Point{GetParam(), kv, "group_7"}));
  Rig rig(open(GetParam()), case_named("group_7"), kv);
  rig.enter(rig.test_case().steps[0]);
  StepTimes times;
  rig.attention(&times);
  EXPECT_GT(times.compress, 0);
  EXPECT_GT(times.score, 0);
  if (rig.backend().kernels->score_select.run == nullptr) {
    EXPECT_GT(times.select, 0);
  }
  EXPECT_GT(times.attend, 0);
}

INSTANTIATE_TEST_SUITE_P(Backends, AttentionEdge, ::testing::ValuesIn(all_backends()), backend_id);

}  // namespace
}  // namespace infllm::testing
