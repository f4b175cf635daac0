// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/compress.h"

#include <gmock/gmock.h>

#include "tests/support/grid.h"
#include "tests/support/refusal.h"

namespace infllm::testing {
namespace {

class CompressTest : public ::testing::TestWithParam<Point> {};

TEST_P(CompressTest, StaysWithinTheBudget) {
  SKIP_WITHOUT(GetParam(), compress);
  const Case& c = case_named(GetParam().case_name);
  Rig kernel(open(GetParam().backend), c, GetParam().kv);
  const DType numbers = numbers_type(kernel.backend());
  Rig exact(open("reference"), c, GetParam().kv, numbers);
  Rig rounded(open_rounded(GetParam().kv, DType::kF32), c, GetParam().kv, numbers);
  Ledger fine(label_of(GetParam(), "compress fine"), Error::kAbsolute, GetParam().kv);
  Ledger coarse(label_of(GetParam(), "compress coarse"), Error::kAbsolute, GetParam().kv);
  const Step& step = c.steps.back();
  for (const Step& earlier : c.steps) {
    kernel.enter(earlier);
    exact.enter(earlier);
    rounded.enter(earlier);
  }
  const CachedPlanes got = kernel.read();
  const CachedPlanes want = exact.read();
  const CachedPlanes about = rounded.read();
  const std::int64_t width = std::int64_t{c.heads_kv} * c.head_dim;
  const auto rows = [&](const std::vector<double>& plane) {
    return static_cast<std::int64_t>(plane.size()) / width;
  };
  EXPECT_EQ(got.fine.size(), want.fine.size());
  fine.add(step.size(), {rows(got.fine), width}, got.fine, want.fine, about.fine);
  coarse.add(step.size(), {rows(got.coarse), width}, got.coarse, want.coarse, about.coarse);
  EXPECT_TRUE(fine.balanced());
  EXPECT_TRUE(coarse.balanced());
}

// Small integers add up exactly in any order, so nothing is left but the one rounding at the end,
// and that one is to the nearest, ties to even.
TEST_P(CompressTest, RoundsOnceAndToTheNearest) {
  SKIP_WITHOUT(GetParam(), compress);
  const Case& c = case_named(GetParam().case_name);
  if ((c.config.kernel_size & (c.config.kernel_size - 1)) != 0) return;  // division rounds too
  Rig kernel(open(GetParam().backend), c, GetParam().kv);
  Rig exact(open("reference"), c, GetParam().kv);
  Random random(5);
  for (std::size_t s = 0; s < kernel.numbers().size(); ++s) {
    SequenceNumbers& numbers = kernel.numbers()[s];
    for (double& k : numbers.k) k = static_cast<double>(random.below(255) - 127);
    for (double& k : numbers.k_score) k = static_cast<double>(random.below(255) - 127);
    exact.numbers()[s] = numbers;
  }
  kernel.enter(c.steps.back());
  exact.enter(c.steps.back());
  EXPECT_EQ(kernel.read().fine, exact.read().fine) << describe(label_of(GetParam(), "compress"));
  EXPECT_EQ(kernel.read().coarse, exact.read().coarse)
      << describe(label_of(GetParam(), "compress"));
}

INSTANTIATE_TEST_SUITE_P(Grid, CompressTest, ::testing::ValuesIn(grid()), point_name);

// What every column owes to itself, bit by bit.
class CompressPieces : public ::testing::TestWithParam<std::string> {};

TEST_P(CompressPieces, OneByOneAtOnceAndLateAreTheSame) {
  const Point point{GetParam(), cache_types(GetParam()).back(), "chunked"};
  SKIP_WITHOUT(point, compress);
  const Case& c = case_named(point.case_name);
  const Step whole(static_cast<std::size_t>(c.sequences()), Span{0, c.length(0)});

  Rig in_pieces(open(GetParam()), c, point.kv);
  for (const Step& step : c.steps) in_pieces.enter(step);
  Rig at_once(open(GetParam()), c, point.kv);
  at_once.enter(whole);
  // A model that was dense so far starts to pool at some token: everything, then the new windows.
  Rig late(open(GetParam()), c, point.kv);
  late.pool_on_enter(false);
  const std::size_t start = c.steps.size() / 2;
  for (std::size_t i = 0; i < start; ++i) late.enter(c.steps[i]);
  const std::vector<std::int32_t> zeros(static_cast<std::size_t>(c.sequences()), 0);
  const Buffer from = upload(late.backend(), zeros);
  CompressParams params = late.compress_params();
  params.from_length = from.as<std::int32_t>();
  must(compress(late.backend(), params));
  late.pool_on_enter(true);
  for (std::size_t i = start; i < c.steps.size(); ++i) late.enter(c.steps[i]);

  const CachedPlanes want = at_once.read();
  for (Rig* rig : {&in_pieces, &late}) {
    const CachedPlanes got = rig->read();
    EXPECT_EQ(got.fine, want.fine) << GetParam();
    EXPECT_EQ(got.coarse, want.coarse) << GetParam();
  }
}

TEST_P(CompressPieces, TheMeanOfAConstantIsTheConstant) {
  Point point{GetParam(), cache_types(GetParam()).back(), "windows_48_16"};
  if (!layout_refusal(point).empty()) point.case_name = "group_7";
  SKIP_WITHOUT(point, compress);
  Rig rig(open(GetParam()), case_named(point.case_name), point.kv);
  for (SequenceNumbers& numbers : rig.numbers()) {
    std::fill(numbers.k.begin(), numbers.k.end(), 0.375);
  }
  rig.enter(rig.test_case().steps[0]);
  const CachedPlanes planes = rig.read();
  EXPECT_FALSE(planes.coarse.empty());
  EXPECT_THAT(planes.fine, ::testing::Each(0.375));
  EXPECT_THAT(planes.coarse, ::testing::Each(0.375));
}

// Speculation: tokens are appended, rejected and replaced.
TEST_P(CompressPieces, WindowsOfRejectedTokensAreReplaced) {
  const Point point{GetParam(), cache_types(GetParam()).back(), "chunked"};
  SKIP_WITHOUT(point, compress);
  const Case& c = case_named(point.case_name);
  const auto step = [&](std::int32_t first, std::int32_t end) {
    return Step(static_cast<std::size_t>(c.sequences()), Span{first, end});
  };
  Rig want(open(GetParam()), c, point.kv);
  want.enter(step(0, 600));

  Rig got(open(GetParam()), c, point.kv);
  const std::vector<SequenceNumbers> accepted = got.numbers();
  got.enter(step(0, 500));
  for (SequenceNumbers& numbers : got.numbers()) {
    for (double& k : numbers.k) k = -k;
  }
  got.enter(step(500, 580));
  got.numbers() = accepted;
  got.enter(step(500, 600));
  EXPECT_EQ(got.read().k, want.read().k);
  EXPECT_EQ(got.read().fine, want.read().fine);
  EXPECT_EQ(got.read().coarse, want.read().coarse);
}

INSTANTIATE_TEST_SUITE_P(Backends, CompressPieces, ::testing::ValuesIn(all_backends()), backend_id);

TEST(CompressRefusal, NamesWhatIsWrong) {
  using ::testing::HasSubstr;
  Rig rig(open("reference"), case_named("group_2_dim_128"), DType::kF32);
  rig.enter(rig.test_case().steps[0]);
  CompressParams params = rig.compress_params();
  params.pages.layout.pooled_keys = false;
  EXPECT_THAT(message_of(compress(rig.backend(), params)),
              HasSubstr("compress: the cache has no room for pooled keys"));
  params.pages.data = nullptr;
  EXPECT_EQ(message_of(compress(rig.backend(), params)),
            "compress: pages.data is null, expected an array");
  params.batch.page_table = nullptr;
  EXPECT_THAT(message_of(compress(rig.backend(), params)), HasSubstr("page_table is null"));
}

}  // namespace
}  // namespace infllm::testing
