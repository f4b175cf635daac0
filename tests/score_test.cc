// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/score.h"

#include <gmock/gmock.h>

#include <cmath>

#include "infllm/backend/reference/rounding.h"
#include "tests/support/grid.h"
#include "tests/support/refusal.h"

namespace infllm::testing {
namespace {

class ScoreTest : public ::testing::TestWithParam<Point> {};

DType stored_type(const Rig& kernel) {
  return kernel.config().score_rounding == ScoreRounding::kBF16
             ? DType::kBF16
             : kernel.backend().kernels->accumulate;
}

TEST_P(ScoreTest, StaysWithinTheBudget) {
  SKIP_WITHOUT(GetParam(), score);
  Trio trio(GetParam());
  Ledger ledger(label_of(GetParam(), "score"), Error::kRelative, stored_type(trio.kernel));
  for (std::size_t i = 0; i < trio.steps().size(); ++i) {
    trio.enter(trio.steps()[i]);
    if (!trio.kernel.batch().any_sparse) continue;
    const std::int64_t blocks = trio.kernel.blocks();
    const auto scores = [&](Rig& rig) { return sparse_rows(rig, rig.score(), blocks); };
    const std::vector<double> got = scores(trio.kernel);
    const auto rows = static_cast<std::int64_t>(got.size()) / blocks;
    ledger.add(i, {rows, blocks}, got, scores(trio.exact), scores(trio.rounded));
  }
  EXPECT_TRUE(ledger.balanced());
}

// Rounded to bf16 means: to the nearest, and nothing but bf16 numbers comes out.
TEST_P(ScoreTest, YieldsNumbersOfTheRoundingAskedFor) {
  SKIP_WITHOUT(GetParam(), score);
  Rig kernel(open(GetParam().backend), case_named(GetParam().case_name), GetParam().kv);
  if (kernel.config().score_rounding != ScoreRounding::kBF16) return;
  kernel.enter(kernel.test_case().steps[0]);
  if (!kernel.batch().any_sparse) return;
  for (const double score : sparse_rows(kernel, kernel.score(), kernel.blocks())) {
    ASSERT_EQ(score, round_to_bf16(score)) << describe(label_of(GetParam(), "score"));
  }
}

INSTANTIATE_TEST_SUITE_P(Grid, ScoreTest, ::testing::ValuesIn(grid()), point_name);

class ScoreRefusal : public ::testing::Test {
 protected:
  ScoreRefusal() : rig_(open("reference"), case_named("group_2_dim_128"), DType::kF32) {
    rig_.enter(rig_.test_case().steps[0]);
    params_ = {.pages = rig_.pages(),
               .batch = rig_.batch(),
               .config = rig_.config(),
               .heads_q = 4,
               .scale = rig_.scale(),
               .q = this,
               .scores = this};
  }
  std::string refusal() { return message_of(score(rig_.backend(), params_, {})); }

  Rig rig_;
  ScoreParams params_;
};

TEST_F(ScoreRefusal, NamesWhatIsWrong) {
  using ::testing::HasSubstr;
  EXPECT_THAT(refusal(), HasSubstr("score: the workspace has 0 bytes, expected"));
  params_.q = nullptr;
  EXPECT_EQ(refusal(), "score: q is null, expected an array");
  params_.scale = NAN;
  EXPECT_THAT(refusal(), HasSubstr("score: scale = nan, expected a positive number"));
  params_.heads_q = 5;
  EXPECT_THAT(refusal(), HasSubstr("score: 5 query heads and 2 KV heads, expected"));
  params_.pages.layout.pooled_keys = false;
  params_.heads_q = 4;
  params_.scale = 1;
  EXPECT_THAT(refusal(), HasSubstr("score: the cache has no pooled keys"));
  params_.config.kernel_size = 64;
  EXPECT_THAT(refusal(), HasSubstr("the cache was laid out for 64, 32, 16"));
  params_.batch.max_kv_length = 1 << 20;
  EXPECT_THAT(refusal(), HasSubstr("score: page_table has rows of"));
}

TEST_F(ScoreRefusal, OfABackendWithoutTheStepNamesBoth) {
  Kernels none;
  Backend backend = rig_.backend();
  backend.name = "bare";
  backend.kernels = &none;
  const Status status = score(backend, params_, {});
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_EQ(status.message(), "score: the device \"bare\" has no such step; open another one");
}

}  // namespace
}  // namespace infllm::testing
