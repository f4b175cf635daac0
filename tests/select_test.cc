// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/select.h"

#include <gmock/gmock.h>
#include <rapidcheck.h>

#include <algorithm>
#include <cmath>

#include "tests/support/grid.h"
#include "tests/support/refusal.h"

namespace infllm::testing {
namespace {

class SelectTest : public ::testing::TestWithParam<Point> {};

// The scores that the kernel's type holds: everybody chooses from the same numbers.
std::vector<double> as_float(std::vector<double> scores) {
  for (double& score : scores) score = static_cast<double>(static_cast<float>(score));
  return scores;
}

// Ties go to the lower index, so from equal scores there is one right answer.
TEST_P(SelectTest, FromTheReferencesScoresChoosesTheSameBlocks) {
  SKIP_WITHOUT(GetParam(), select);
  Rig kernel(open(GetParam().backend), case_named(GetParam().case_name), GetParam().kv);
  Rig exact(open("reference"), case_named(GetParam().case_name), GetParam().kv,
            numbers_type(kernel.backend()));
  for (const Step& step : exact.test_case().steps) {
    kernel.enter(step);
    exact.enter(step);
    if (!exact.batch().any_sparse) continue;
    const std::vector<double> scores = as_float(exact.score());
    ASSERT_EQ(kernel.select(scores), exact.select(scores))
        << describe(label_of(GetParam(), "select"));
  }
}

// As when blocks compare equal in bf16: the cut falls into a run of equal scores nearly always.
TEST_P(SelectTest, PlantedTiesGoToTheLowerIndex) {
  SKIP_WITHOUT(GetParam(), select);
  Rig kernel(open(GetParam().backend), case_named(GetParam().case_name), GetParam().kv);
  Rig exact(open("reference"), case_named(GetParam().case_name), GetParam().kv,
            numbers_type(kernel.backend()));
  const Step& step = exact.test_case().steps.back();
  kernel.enter(step);
  exact.enter(step);
  if (!exact.batch().any_sparse) return;
  Random random(exact.test_case().seed);
  for (const std::int64_t levels : {1, 2, 3}) {
    std::vector<double> scores = exact.score();
    for (double& score : scores) {
      if (std::isfinite(score)) score = static_cast<double>(random.below(levels));
    }
    ASSERT_EQ(kernel.select(scores), exact.select(scores))
        << describe(label_of(GetParam(), "select"));
  }
}

TEST_P(SelectTest, FromItsOwnScoresChoosesWellByValue) {
  SKIP_WITHOUT(GetParam(), score);
  SKIP_WITHOUT(GetParam(), select);
  Trio trio(GetParam());
  const DType stored = trio.kernel.config().score_rounding == ScoreRounding::kBF16
                           ? DType::kBF16
                           : trio.kernel.backend().kernels->accumulate;
  const Label label = label_of(GetParam(), "select");
  for (std::size_t i = 0; i < trio.steps().size(); ++i) {
    trio.enter(trio.steps()[i]);
    if (!trio.kernel.batch().any_sparse) continue;
    const std::vector<double> exact = trio.exact.score();
    const std::int64_t blocks = trio.kernel.blocks();
    const std::vector<double> rows = sparse_rows(trio.exact, exact, blocks);
    Ledger ledger(label, Error::kRelative, stored);
    ledger.add(i, {static_cast<std::int64_t>(rows.size()) / blocks, blocks}, rows, rows,
               sparse_rows(trio.rounded, trio.rounded.score(), blocks));
    ASSERT_TRUE(well_chosen(trio.kernel, trio.kernel.select(trio.kernel.score()), exact,
                            ledger.relative_budget(), stored, label));
    // In one step, where the column has it: judged alike.
    ASSERT_TRUE(well_chosen(trio.kernel, trio.kernel.choose(), exact, ledger.relative_budget(),
                            stored, label_of(GetParam(), "score_select")));
  }
}

INSTANTIATE_TEST_SUITE_P(Grid, SelectTest, ::testing::ValuesIn(grid()), point_name);

// One sequence whose last `tokens` tokens choose from given scores.
struct Choice {
  SparseConfig config;
  std::int32_t length = 0;
  std::int32_t tokens = 0;
  std::vector<float> scores;  // [1, tokens, blocks]

  std::vector<std::int32_t> on(const std::string& backend_name, int* columns = nullptr) const {
    const Backend backend = open(backend_name);
    const Buffer starts = upload(backend, std::vector<std::int32_t>{0, tokens});
    const Buffer lengths = upload(backend, std::vector<std::int32_t>{length});
    const std::uint8_t yes = 1;
    const Buffer sparse = must(allocate(backend, 1));
    must(copy_in(backend, sparse.data(), &yes, 1));
    const Buffer device_scores = upload(backend, std::vector<double>(scores.begin(), scores.end()),
                                        backend.kernels->accumulate);
    SelectParams params{.batch = {.num_sequences = 1,
                                  .num_tokens = tokens,
                                  .query_start = starts.as<std::int32_t>(),
                                  .kv_length = lengths.as<std::int32_t>(),
                                  .sparse = sparse.as<std::uint8_t>(),
                                  .any_sparse = true,
                                  .max_query_length = tokens,
                                  .max_kv_length = length},
                        .config = config,
                        .heads_kv = 1,
                        .scores = device_scores.data()};
    if (columns != nullptr) *columns = params.columns();
    std::vector<std::int32_t> selection(static_cast<std::size_t>(tokens) * params.columns(), -7);
    const Buffer device_selection = upload(backend, selection);
    params.selection = device_selection.as<std::int32_t>();
    must(select(backend, params));
    must(copy_out(backend, selection.data(), device_selection.data(),
                  selection.size() * sizeof(std::int32_t)));
    return selection;
  }
};

Choice arbitrary_choice() {
  Choice choice;
  choice.config.init_blocks = *rc::gen::inRange(0, 4);
  choice.config.window_size = 64 * *rc::gen::inRange(0, 5);
  choice.config.topk = *rc::gen::inRange(1, 12);
  choice.config.legacy_window = choice.config.window_size > 0 && *rc::gen::arbitrary<bool>();
  choice.config.dense_len = -1;
  choice.length = *rc::gen::inRange(1, 64 * 150);
  choice.tokens = *rc::gen::inRange(1, std::min(choice.length, 70) + 1);
  const auto count =
      static_cast<std::size_t>(choice.tokens) * choice.config.blocks_in(choice.length);
  // Few values, so that ties are everywhere; -inf is what blocks without windows score.
  choice.scores = *rc::gen::container<std::vector<float>>(
      count, rc::gen::element(0.0f, 0.25f, 0.5f, 1.0f, 2.0f, -INFINITY));
  return choice;
}

// What selection is by definition: sort the candidates by (forced, score, index), take the first.
std::vector<std::int32_t> by_sorting(const Choice& choice, std::int32_t token, int columns) {
  const SparseConfig& config = choice.config;
  const std::int64_t position = choice.length - choice.tokens + token;
  const auto own = static_cast<std::int32_t>(position / config.block_size);
  const std::int32_t window = config.window_blocks() + (config.legacy_window ? 0 : 1);
  const float* scores = choice.scores.data() + token * config.blocks_in(choice.length);
  std::vector<std::tuple<int, double, std::int32_t>> order;
  for (std::int32_t b = 0; b <= own; ++b) {
    if (own - b < window) {
      order.emplace_back(0, own - b, b);
    } else if (b < config.init_blocks) {
      order.emplace_back(1, b, b);
    } else {
      order.emplace_back(2, -static_cast<double>(scores[b]), b);
    }
  }
  std::sort(order.begin(), order.end());
  order.resize(std::min<std::size_t>(order.size(), static_cast<std::size_t>(columns)));
  std::vector<std::int32_t> chosen;
  for (const auto& [tier, key, b] : order) chosen.push_back(b);
  std::sort(chosen.begin(), chosen.end());
  chosen.resize(static_cast<std::size_t>(columns), -1);
  return chosen;
}

class SelectProperty : public ::testing::TestWithParam<std::string> {};

TEST_P(SelectProperty, IsSortingByDefinition) {
  if (open(GetParam(), 1).kernels->select.run == nullptr) {
    GTEST_SKIP() << GetParam() << " has no select";
  }
  EXPECT_TRUE(rc::check("select sorts", [&] {
    const Choice choice = arbitrary_choice();
    int columns = 0;
    const std::vector<std::int32_t> got = choice.on(GetParam(), &columns);
    std::vector<std::int32_t> want;
    for (std::int32_t t = 0; t < choice.tokens; ++t) {
      const std::vector<std::int32_t> row = by_sorting(choice, t, columns);
      want.insert(want.end(), row.begin(), row.end());
    }
    RC_ASSERT(got == want);
  }));
}

TEST_P(SelectProperty, DependsOnTheOrderOfScoresOnly) {
  if (open(GetParam(), 1).kernels->select.run == nullptr) {
    GTEST_SKIP() << GetParam() << " has no select";
  }
  EXPECT_TRUE(rc::check("monotone maps change nothing", [&] {
    Choice choice = arbitrary_choice();
    const std::vector<std::int32_t> before = choice.on(GetParam());
    for (float& score : choice.scores) score = score * 1024.0f + 3.0f;
    RC_ASSERT(choice.on(GetParam()) == before);
  }));
}

INSTANTIATE_TEST_SUITE_P(Backends, SelectProperty, ::testing::ValuesIn(all_backends()), backend_id);

TEST(SelectRefusal, NamesWhatIsWrong) {
  using ::testing::HasSubstr;
  const Backend backend = open("reference");
  const std::vector<std::int32_t> starts = {0, 1};
  const std::int32_t length = 1;
  const std::uint8_t sparse = 1;
  SelectParams params{.batch = {.num_sequences = 1,
                                .num_tokens = 1,
                                .query_start = starts.data(),
                                .kv_length = &length,
                                .sparse = &sparse,
                                .any_sparse = true,
                                .max_query_length = 1,
                                .max_kv_length = 1},
                      .heads_kv = 1};
  EXPECT_EQ(message_of(select(backend, params)), "select: scores is null, expected an array");
  params.scores = &sparse;
  EXPECT_EQ(message_of(select(backend, params)), "select: selection is null, expected an array");
  params.heads_kv = 0;
  EXPECT_EQ(message_of(select(backend, params)), "select: 0 KV heads, expected at least 1");
  params.batch.sparse = nullptr;
  EXPECT_THAT(message_of(select(backend, params)),
              HasSubstr("select: batch: any_sparse is set, but sparse is null"));
  params.config.topk = 0;
  EXPECT_THAT(message_of(select(backend, params)), HasSubstr("topk = 0, expected 1 to"));
}

}  // namespace
}  // namespace infllm::testing
