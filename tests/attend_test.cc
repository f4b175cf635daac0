// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/attend.h"

#include <gmock/gmock.h>

#include <cmath>
#include <cstdint>

#include "tests/support/grid.h"
#include "tests/support/refusal.h"

namespace infllm::testing {
namespace {

class AttendTest : public ::testing::TestWithParam<Point> {};

void add(Ledger& o, Ledger& lse, std::size_t step, const Rig& rig, const Attended& got,
         const Attended& exact, const Attended& rounded) {
  const Case& c = rig.test_case();
  o.add(step, {rig.tokens(), c.heads_q, c.head_dim}, got.o, exact.o, rounded.o);
  lse.add(step, {c.heads_q, rig.tokens()}, got.lse, exact.lse, rounded.lse);
}

struct Ledgers {
  Ledgers(const Point& point, const Rig& kernel, const std::string& op)
      : o(label_of(point, op), Error::kAbsolute, kernel.backend().kernels->activation),
        lse(label_of(point, op + " lse"), Error::kAbsolute, kernel.backend().kernels->accumulate) {}
  Ledger o;
  Ledger lse;
};

// Everybody attends to the blocks that the exact reference chose.
TEST_P(AttendTest, StaysWithinTheBudget) {
  SKIP_WITHOUT(GetParam(), attend);
  Trio trio(GetParam());
  Ledgers ledgers(GetParam(), trio.kernel, "attend");
  for (std::size_t i = 0; i < trio.steps().size(); ++i) {
    trio.enter(trio.steps()[i]);
    std::vector<std::int32_t> chosen;
    if (trio.exact.batch().any_sparse) chosen = trio.exact.select(trio.exact.score());
    add(ledgers.o, ledgers.lse, i, trio.kernel, trio.kernel.attend(chosen),
        trio.exact.attend(chosen), trio.rounded.attend(chosen));
  }
  EXPECT_TRUE(ledgers.o.balanced());
  EXPECT_TRUE(ledgers.lse.balanced());
}

INSTANTIATE_TEST_SUITE_P(Grid, AttendTest, ::testing::ValuesIn(grid()), point_name);

class AttendEdge : public ::testing::TestWithParam<std::string> {};

// Blocks in any number, any place: the selection need not be one that select() would make.
TEST_P(AttendEdge, TakesAnySelection) {
  for (const DType kv : cache_types(GetParam())) {
    const Point point{GetParam(), kv, "group_7"};
    SKIP_WITHOUT(point, attend);
    Trio trio(point);
    trio.enter(trio.steps()[0]);
    Ledgers ledgers(point, trio.kernel, "attend (random blocks)");
    Random random(11);
    std::vector<std::int32_t> chosen;
    for (std::int32_t g = 0; g < trio.kernel.test_case().heads_kv; ++g) {
      for (std::int32_t t = 0; t < trio.kernel.tokens(); ++t) {
        const std::int64_t own = trio.kernel.position(t) / trio.kernel.config().block_size;
        std::vector<std::int32_t> row;
        for (std::int32_t b = 0; b <= own; ++b) {
          if (static_cast<std::int32_t>(row.size()) < trio.kernel.columns() &&
              random.below(2) == 0) {
            row.push_back(b);
          }
        }
        row.resize(static_cast<std::size_t>(trio.kernel.columns()), -1);
        chosen.insert(chosen.end(), row.begin(), row.end());
      }
    }
    add(ledgers.o, ledgers.lse, 0, trio.kernel, trio.kernel.attend(chosen),
        trio.exact.attend(chosen), trio.rounded.attend(chosen));
    EXPECT_TRUE(ledgers.o.balanced());
    EXPECT_TRUE(ledgers.lse.balanced());
  }
}

// A device looks at a number before it follows it: what is no block is left out.
TEST_P(AttendEdge, NumbersThatAreNoBlocksAreLeftOut) {
  if (!is_device(open(GetParam(), 1))) GTEST_SKIP() << "hosts believe their own selection";
  const DType kv = cache_types(GetParam()).front();
  for (const char* name : {"edges_decode", "edges_prefill", "group_7", "group_16", "many_blocks"}) {
    const Case& c = case_named(name);
    Rig rig(open(GetParam()), c, kv);
    rig.enter(c.steps.back());
    std::vector<std::int32_t> chosen = rig.choose();
    const auto columns = static_cast<std::size_t>(rig.columns());
    std::vector<std::size_t> left_out;  // of each row that has two blocks, the last one
    for (std::size_t row = 0; row < chosen.size(); row += columns) {
      std::size_t used = 0;
      while (used < columns && chosen[row + used] >= 0) ++used;
      if (used < 2) continue;
      left_out.push_back(row + used - 1);
      chosen[left_out.back()] = -1;
    }
    ASSERT_FALSE(left_out.empty());
    const Attended want = rig.attend(chosen);
    const auto blocks = static_cast<std::int32_t>(rig.blocks());
    for (const std::int32_t id : {blocks, 1 << 29, INT32_MAX, -2, INT32_MIN}) {
      for (const std::size_t i : left_out) chosen[i] = id;
      const Attended got = rig.attend(chosen);
      for (std::int32_t t = 0; t < rig.tokens(); ++t) {
        if (!rig.sparse(t)) continue;
        const std::int64_t row = std::int64_t{c.heads_q} * c.head_dim;
        for (std::int64_t i = t * row; i < (t + 1) * row; ++i) {
          ASSERT_EQ(got.o[i], want.o[i]) << name << " block " << id << " token " << t;
        }
      }
    }
  }
}

TEST_P(AttendEdge, ARowThatSeesNothingIsZero) {
  const Point point{GetParam(), cache_types(GetParam()).back(), "group_2_dim_128"};
  SKIP_WITHOUT(point, attend);
  Rig kernel(open(GetParam()), case_named(point.case_name), point.kv);
  kernel.enter(kernel.test_case().steps[0]);
  const std::size_t size =
      static_cast<std::size_t>(kernel.test_case().heads_kv) * kernel.tokens() * kernel.columns();
  const Attended out = kernel.attend(std::vector<std::int32_t>(size, -1));
  EXPECT_THAT(out.o, ::testing::Each(0.0));
  EXPECT_THAT(out.lse, ::testing::Each(-INFINITY));
}

INSTANTIATE_TEST_SUITE_P(Backends, AttendEdge, ::testing::ValuesIn(kernel_backends()), backend_id);

TEST(AttendRefusal, NamesWhatIsWrong) {
  using ::testing::HasSubstr;
  Rig rig(open("reference"), case_named("group_2_dim_128"), DType::kF32);
  rig.enter(rig.test_case().steps[0]);
  AttendParams params{.pages = rig.pages(), .batch = rig.batch(), .heads_q = 4, .scale = 1};
  const auto refusal = [&] { return message_of(attend(rig.backend(), params, {})); };
  EXPECT_EQ(refusal(), "attend: q is null, expected an array");
  params.q = &rig;
  EXPECT_EQ(refusal(), "attend: o is null, expected an array");
  params.o = &rig;
  EXPECT_THAT(refusal(), HasSubstr("expected"));
  params.columns = 3;
  EXPECT_EQ(refusal(), "attend: 3 columns without a selection, expected 0");
  const std::int32_t block = 0;
  params.selection = &block;
  params.columns = 0;
  EXPECT_THAT(refusal(), HasSubstr("attend: a selection of 0 columns, expected at least 1"));
  params.scale = -1;
  EXPECT_THAT(refusal(), HasSubstr("attend: scale = -1, expected a positive number"));
  params.heads_q = 3;
  EXPECT_THAT(refusal(), HasSubstr("attend: 3 query heads and 2 KV heads"));
  params.pages.data = nullptr;
  EXPECT_EQ(refusal(), "attend: pages.data is null, expected an array");
  params.batch.max_query_length = 1000;
  EXPECT_THAT(refusal(), HasSubstr("attend: batch: max_query_length = 1000"));

  AttendBackwardParams backward{.forward = {.pages = rig.pages(),
                                            .batch = rig.batch(),
                                            .heads_q = 4,
                                            .scale = 1,
                                            .q = &rig,
                                            .o = &rig}};
  EXPECT_THAT(message_of(attend_backward(rig.backend(), backward, {})),
              HasSubstr("attend_backward: lse (of the forward pass) is null"));
}

}  // namespace
}  // namespace infllm::testing
