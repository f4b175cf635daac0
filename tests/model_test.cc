// SPDX-License-Identifier: Apache-2.0
//
// The whole model: against Hugging Face, against itself in other cuts, and against float64.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "infllm/backend/open.h"
#include "infllm/ops/kernels.h"
#include "tests/support/budget.h"
#include "tests/support/model_rig.h"
#include "tests/support/rig.h"

namespace infllm::testing {
namespace {

using ::testing::HasSubstr;

constexpr double kAgreement = 1e-4;  // of the largest logit: what float32 models promise

const char* const kFloat32Cases[] = {"llama-group1", "llama-llama3", "minicpm-tied",
                                     "minicpm-sharded"};
const char* const kBf16Cases[] = {"llama-yarn-bf16", "minicpm-bf16"};

// Sparse from the first token on, few blocks: 1 sink, 1 + 1 local, 2 others.
const model::Overrides kSparse{.window_size = 64, .topk = 4, .dense_len = -1};

std::vector<std::int32_t> part(const std::vector<std::int32_t>& tokens, std::size_t first,
                               std::size_t last) {
  return {tokens.begin() + static_cast<std::ptrdiff_t>(first),
          tokens.begin() + static_cast<std::ptrdiff_t>(last)};
}

// The prompt in chunks of at most `size` tokens.
std::vector<Row> prefill_in_chunks(ModelRig& rig, const std::vector<std::int32_t>& prompt,
                                   std::size_t size) {
  std::vector<Row> logits;
  for (std::size_t first = 0; first < prompt.size(); first += size) {
    const std::vector<Row> rows =
        rig.step({{.tokens = part(prompt, first, std::min(prompt.size(), first + size)),
                   .length = static_cast<std::int32_t>(prompt.size())}});
    logits.insert(logits.end(), rows.begin(), rows.end());
  }
  return logits;
}

class ModelTest : public ::testing::TestWithParam<std::string> {
 protected:
  // One thread: layers of a toy model are shorter than waking another one.
  // Devices compute in 16 bits, and choose kernels by the shape of the step.
  bool on_device() const { return is_device(backend_); }

  Backend backend_ = open(GetParam(), 1);
};

// What follows asks for float32, or for the same bits; devices are held to the budget of their type
// (LogitsOfADeviceStayWithinTheErrorOfItsType).
#define HOSTS_ONLY() \
  if (on_device()) GTEST_SKIP() << "a device computes in 16 bits, by kernels of the step's shape"

std::string test_name(const ::testing::TestParamInfo<std::string>& info) {
  std::string name = info.param;
  std::replace(name.begin(), name.end(), ':', '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Backends, ModelTest, ::testing::ValuesIn(available_backends()), test_name);

TEST_P(ModelTest, Float32LogitsAreThoseOfHuggingFace) {
  HOSTS_ONLY();
  for (const char* name : kFloat32Cases) {
    const ModelGolden golden = read_golden(name);
    ModelRig rig(load_golden(backend_, name), 1, 512);
    const std::vector<Row> logits = pick(rig.step({{.tokens = golden.prompt}}), golden.rows);
    EXPECT_LE(distance(logits, golden.logits) / golden.largest, kAgreement) << name;
  }
}

// Hugging Face's float32 run is an honest float32 run: its distance from float64 is the budget.
TEST_P(ModelTest, Float32LogitsAreAsCloseToFloat64AsHuggingFace) {
  HOSTS_ONLY();
  if (GetParam() == "reference") GTEST_SKIP() << "this is the truth itself";
  for (const char* name : kFloat32Cases) {
    const ModelGolden golden = read_golden(name);
    ModelRig exact_rig(load_golden(open("reference"), name), 1, 512);
    const std::vector<Row> exact = pick(exact_rig.step({{.tokens = golden.prompt}}), golden.rows);
    ModelRig rig(load_golden(backend_, name), 1, 512);
    const std::vector<Row> logits = pick(rig.step({{.tokens = golden.prompt}}), golden.rows);
    EXPECT_LE(distance(logits, exact),
              2 * distance(golden.logits, exact) + ulp(golden.largest, DType::kF32))
        << name;
  }
}

TEST_P(ModelTest, GreedyTextIsThatOfHuggingFace) {
  HOSTS_ONLY();
  for (const char* name : kFloat32Cases) {
    const ModelGolden golden = read_golden(name);
    // Both of the best logits may be off by kAgreement.
    ASSERT_GE(golden.margin, 2 * kAgreement) << name << ": the text would prove nothing";
    ModelRig rig(load_golden(backend_, name), 1, 512);
    EXPECT_EQ(rig.greedy(0, golden.prompt, 200), golden.greedy) << name;
  }
}

TEST_P(ModelTest, Bf16LogitsStayWithinTheErrorOfBf16) {
  for (const char* name : kBf16Cases) {
    const ModelGolden golden = read_golden(name);
    ModelRig rig(load_golden(backend_, name), 1, 512);
    if (!on_device()) {
      EXPECT_EQ(rig.model().weights().format, WeightFormat::kBF16);
      EXPECT_EQ(rig.model().kv_dtype(), DType::kBF16);
    }
    const std::vector<Row> logits = pick(rig.step({{.tokens = golden.prompt}}), golden.rows);
    EXPECT_LE(distance(logits, golden.logits),
              2 * golden.bf16_error + ulp(golden.largest, DType::kBF16))
        << name;
  }
}

// Whole prompts, chunks and single tokens, which a device computes by different kernels.
TEST_P(ModelTest, LogitsOfADeviceStayWithinTheErrorOfItsType) {
  if (!on_device()) GTEST_SKIP() << "hosts are held to more";
  const DType type = backend_.kernels->activation;
  const std::vector<std::int32_t> prompt = random_tokens(200, 1);
  for (const char* name : {"minicpm-sharded", "minicpm-bf16"}) {
    ModelRig exact_rig(load_golden(open("reference"), name), 1, 256);
    const std::vector<Row> exact = exact_rig.step({{.tokens = prompt}});
    ModelRig rounded_rig(load_golden(open_rounded(type, type), name), 1, 256);
    const double rounding = distance(rounded_rig.step({{.tokens = prompt}}), exact);
    double largest = 0;
    for (const Row& row : exact) {
      for (const float value : row) largest = std::max(largest, std::abs(double{value}));
    }
    for (const std::size_t size : {1000u, 1u, 7u, 64u, 129u}) {
      ModelRig rig(load_golden(backend_, name), 1, 256);
      EXPECT_LE(distance(prefill_in_chunks(rig, prompt, size), exact),
                2 * rounding + ulp(largest, type))
          << name << " in chunks of " << size;
    }
  }
}

TEST_P(ModelTest, ChunksAndSingleTokensGiveWhatTheWholePromptGives) {
  HOSTS_ONLY();
  const std::vector<std::int32_t> prompt = random_tokens(200, 1);
  for (const model::Overrides& overrides : {model::Overrides{}, kSparse}) {
    for (const char* name : {"minicpm-sharded", "minicpm-bf16"}) {
      ModelRig whole(load_golden(backend_, name, overrides), 1, 256);
      const std::vector<Row> expected = whole.step({{.tokens = prompt}});
      for (const std::size_t size : {1u, 7u, 64u, 129u}) {
        ModelRig rig(load_golden(backend_, name, overrides), 1, 256);
        EXPECT_EQ(distance(prefill_in_chunks(rig, prompt, size), expected), 0)
            << name << " in chunks of " << size << (overrides.topk ? " sparse" : " dense");
      }
    }
  }
}

// Ragged steps that mix prefill, chunks with history, decoding and a sequence without tokens.
TEST_P(ModelTest, BatchedGivesWhatAloneGives) {
  HOSTS_ONLY();
  const std::vector<std::int32_t> prompts[] = {random_tokens(200, 2), random_tokens(65, 3),
                                               random_tokens(131, 4)};
  for (const model::Overrides& overrides : {model::Overrides{}, kSparse}) {
    std::vector<Row> expected[3];
    for (int i = 0; i < 3; ++i) {
      ModelRig alone(load_golden(backend_, "minicpm-sharded", overrides), 1, 256);
      expected[i] = prefill_in_chunks(alone, prompts[i], 1000);
    }
    const auto chunk = [&](int i, std::size_t first, std::size_t last) {
      return Chunk{.sequence = i,
                   .tokens = part(prompts[i], first, last),
                   .length = static_cast<std::int32_t>(prompts[i].size())};
    };
    const std::vector<Chunk> steps[] = {
        {chunk(0, 0, 100), chunk(1, 0, 64)},
        {chunk(2, 0, 130), chunk(1, 64, 64), chunk(0, 100, 101)},
        {chunk(1, 64, 65), chunk(0, 101, 200), chunk(2, 130, 131)},
    };
    ModelRig rig(load_golden(backend_, "minicpm-sharded", overrides), 3, 256);
    std::vector<Row> got[3];
    for (const std::vector<Chunk>& step : steps) {
      const std::vector<Row> rows = rig.step(step);
      std::size_t row = 0;
      for (const Chunk& piece : step) {
        for (std::size_t i = 0; i < piece.tokens.size(); ++i) {
          got[piece.sequence].push_back(rows[row++]);
        }
      }
    }
    for (int i = 0; i < 3; ++i) EXPECT_EQ(distance(got[i], expected[i]), 0) << "sequence " << i;
  }
}

TEST_P(ModelTest, ThreadsDoNotChangeTheLogits) {
  const std::vector<std::int32_t> prompt = random_tokens(150, 5);
  ModelRig one(load_golden(backend_, "minicpm-bf16", kSparse), 1, 256);
  ModelRig three(load_golden(open(GetParam(), 3), "minicpm-bf16", kSparse), 1, 256);
  EXPECT_EQ(distance(one.step({{.tokens = prompt}}), three.step({{.tokens = prompt}})), 0);
}

TEST_P(ModelTest, SparseWithEveryBlockIsDense) {
  HOSTS_ONLY();
  const std::vector<std::int32_t> prompt = random_tokens(400, 6);
  ModelRig dense(load_golden(backend_, "minicpm-sharded"), 1, 512);
  ModelRig sparse(load_golden(backend_, "minicpm-sharded", {.dense_len = -1}), 1, 512);
  EXPECT_TRUE(sparse.pages().front().layout.pooled_keys);
  EXPECT_EQ(distance(sparse.step({{.tokens = prompt}}), dense.step({{.tokens = prompt}})), 0);
}

// Scores are compared unrounded here: bf16 would make near ties that two columns may break apart.
TEST_P(ModelTest, SmallSparseBudgetAgreesWithFloat64) {
  HOSTS_ONLY();
  if (GetParam() == "reference") GTEST_SKIP() << "this is the truth itself";
  const std::vector<std::int32_t> prompt = random_tokens(700, 7);
  for (const bool use_nope : {false, true}) {
    model::Overrides overrides = kSparse;
    overrides.use_nope = use_nope;
    overrides.score_rounding = ScoreRounding::kNone;
    ModelRig exact(load_golden(open("reference", 1), "minicpm-tied", overrides), 1, 704);
    ModelRig dense(load_golden(open("reference", 1), "minicpm-tied"), 1, 704);
    ModelRig rig(load_golden(backend_, "minicpm-tied", overrides), 1, 704);
    const std::vector<Row> expected = exact.step({{.tokens = prompt}});
    double largest = 0;
    for (const float value : expected.back()) largest = std::max(largest, std::abs(double{value}));
    EXPECT_LE(distance(rig.step({{.tokens = prompt}}), expected) / largest, kAgreement);
    EXPECT_GT(distance(dense.step({{.tokens = prompt}}), expected) / largest, 100 * kAgreement)
        << "the budget must leave something out";
  }
}

TEST_P(ModelTest, Int8WeightsAgreeWithFloat64OverTheSameCodes) {
  if (GetParam() == "reference") GTEST_SKIP() << "this is the truth itself";
  if (on_device()) GTEST_SKIP() << "devices refuse int8 weights";
  const ModelGolden golden = read_golden("minicpm-bf16");
  for (const std::int32_t group : {0, 32}) {
    const auto run = [&](const Backend& backend) {
      const model::LoadOptions options{.format = WeightFormat::kI8, .int8_group_size = group};
      ModelRig rig(load_golden(backend, "minicpm-bf16", {}, options), 1, 256);
      return rig.step({{.tokens = golden.prompt}});
    };
    const std::vector<Row> exact = run(open("reference", 1));
    const std::vector<Row> rounded = run(open_rounded(DType::kBF16, DType::kF32, 1));
    EXPECT_LE(distance(run(backend_), exact),
              2 * distance(rounded, exact) + ulp(golden.largest, DType::kBF16))
        << group;
  }
}

TEST_P(ModelTest, TimesCoverEveryPart) {
  ModelRig rig(load_golden(backend_, "minicpm-tied", kSparse), 1, 512);
  rig.step({{.tokens = random_tokens(400, 8)}});
  const model::ForwardTimes& t = rig.times;
  const double parts[] = {t.attention.compress,
                          t.attention.score,
                          t.attention.attend,
                          t.embed,
                          t.norm,
                          t.projections,
                          t.rope,
                          t.mlp,
                          t.head};
  double sum = 0;
  for (const double seconds : parts) {
    EXPECT_GT(seconds, 0);
    sum += seconds;
  }
  // A device may score and select, or rotate and append, in one step: it counts as the first.
  for (const double seconds : {t.attention.select, t.cache}) {
    if (!on_device()) {
      EXPECT_GT(seconds, 0);
    }
    sum += seconds;
  }
  EXPECT_DOUBLE_EQ(t.total(), sum);
}

class ForwardErrors : public ::testing::Test {
 protected:
  ForwardErrors() : rig_(load_golden(open("reference", 1), "minicpm-tied"), 1, 64) {
    params_ = {.batch = {.num_sequences = 1,
                         .num_tokens = 1,
                         .query_start = starts_,
                         .kv_length = &one_,
                         .page_table = &zero_,
                         .max_pages = 1,
                         .max_query_length = 1,
                         .max_kv_length = 1},
               .token_ids = &zero_,
               .positions = &zero_,
               .pages = rig_.pages(),
               .logit_rows = &zero_,
               .num_logits = 1,
               .logits = logits_,
               .workspace = workspace_};
  }
  std::string message(const model::ForwardParams& params) {
    return rig_.model().forward(params).message();
  }

  ModelRig rig_;
  std::int32_t zero_ = 0;
  std::int32_t one_ = 1;
  std::int32_t starts_[2] = {0, 1};
  double logits_[kGoldenVocabulary] = {};
  std::vector<std::byte> workspace_ = std::vector<std::byte>(std::size_t{1} << 20);
  model::ForwardParams params_;
};

TEST_F(ForwardErrors, GoodParametersPass) { EXPECT_EQ(message(params_), ""); }

TEST_F(ForwardErrors, NothingToDoIsFine) {
  params_.batch.num_tokens = 0;
  params_.batch.max_query_length = 0;
  starts_[1] = 0;
  params_.num_logits = 0;
  params_.token_ids = nullptr;
  params_.workspace = {};
  EXPECT_EQ(message(params_), "");
}

TEST_F(ForwardErrors, EachMistakeIsNamed) {
  const auto with = [&](auto change) {
    model::ForwardParams params = params_;
    change(params);
    return message(params);
  };
  using P = model::ForwardParams;
  EXPECT_THAT(with([](P& p) { p.pages = p.pages.first(1); }),
              HasSubstr("caches of 1 layers, expected 2"));
  const std::uint8_t sparse = 1;
  EXPECT_THAT(with([&](P& p) {
                p.batch.any_sparse = true;
                p.batch.sparse = &sparse;
              }),
              HasSubstr("no sparse_config"));
  EXPECT_THAT(with([](P& p) { p.num_logits = 2; }), HasSubstr("2 rows of logits for 1 tokens"));
  EXPECT_THAT(with([](P& p) { p.positions = nullptr; }), HasSubstr("positions is null"));
  EXPECT_THAT(with([](P& p) { p.logits = nullptr; }), HasSubstr("logits is null"));
  EXPECT_THAT(with([](P& p) { p.workspace = p.workspace.first(100); }),
              HasSubstr("the workspace has 100 bytes, expected"));
  EXPECT_THAT(with([](P& p) { p.batch.num_tokens = -1; }), HasSubstr("-1"));
}

}  // namespace
}  // namespace infllm::testing
