// SPDX-License-Identifier: Apache-2.0
//
// Recorded steps give what steps give that run as they come: on a backend that records like a
// device, the engine writes the same text, alone and with neighbours, while lengths grow, while a
// sequence turns sparse, and when only the best logits are looked at.
#include "infllm/engine/runner.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <numeric>

#include "infllm/backend/open.h"
#include "infllm/engine/engine.h"
#include "infllm/model/checkpoint.h"
#include "infllm/ops/kernels.h"
#include "tests/support/grid.h"
#include "tests/support/model_rig.h"
#include "tests/support/recorder.h"
#include "tests/support/rig.h"
#include "tests/support/source_folder.h"

namespace infllm::engine {
namespace {

using testing::kGoldenVocabulary;
using testing::random_tokens;

Tokenizer byte_tokenizer() {
  TokenizerSpec spec;
  for (int i = 0; i < kGoldenVocabulary; ++i) {
    spec.pieces.push_back(fmt::format("p{}", i));
    spec.types.push_back(PieceType::kNormal);
  }
  return testing::must(Tokenizer::create(std::move(spec)));
}

model::Model load(const Backend& backend) {
  return testing::load_golden(backend, "minicpm-tied", testing::sparse_from(150));
}

// Dense, sparse, and answers that cross the border; greedy and drawn in every way that the best
// logits decide, and in some that they do not.
std::vector<Request> requests() {
  const SamplingParams ways[] = {{.temperature = 0},
                                 {.temperature = 0.7f, .top_p = 0.8f, .seed = 1},
                                 {.temperature = 1, .top_k = 20, .seed = 2},
                                 {.temperature = 1, .seed = 3},
                                 {.temperature = 1, .min_p = 0.2f, .seed = 4},
                                 {.temperature = 1, .repetition_penalty = 1.3f, .seed = 5}};
  std::vector<Request> list;
  for (const std::int32_t length : {1, 40, 64, 140, 149, 220}) {
    const std::size_t i = list.size();
    list.push_back({.prompt = random_tokens(length, static_cast<std::uint32_t>(length)),
                    .sampling = ways[i],
                    .max_tokens = static_cast<std::int32_t>(12 + 5 * i)});
  }
  return list;
}

std::vector<std::vector<std::int32_t>> answers(const model::Model& model,
                                               const EngineOptions& options) {
  const Tokenizer tokenizer = byte_tokenizer();
  const auto engine = testing::must(Engine::create(model, tokenizer, options));
  std::vector<Request> list = requests();
  std::vector<std::vector<std::int32_t>> tokens(list.size());
  for (std::size_t i = 0; i < list.size(); ++i) {
    list[i].on_done = [&tokens, i](const Completion& done) { tokens[i] = done.tokens; };
    EXPECT_TRUE(engine->submit(std::move(list[i])).ok());
  }
  while (!engine->idle()) {
    const Status status = engine->step();
    EXPECT_TRUE(status.ok()) << status.message();
    if (!status.ok()) break;
  }
  return tokens;
}

TEST(Runner, RecordedStepsGiveTheSameText) {
  const model::Model plain = load(testing::must(open_backend("reference", {.threads = 2})));
  for (const std::int32_t sequences : {1, 3}) {
    const EngineOptions options{.context = 300, .max_sequences = sequences, .chunk_tokens = 48};
    const auto expected = answers(plain, options);
    testing::Recorder recorder;
    const model::Model model = load(recorder.backend());
    EXPECT_EQ(answers(model, options), expected) << sequences << " at a time";
    // Dense and sparse of each number of sequences, at most.
    EXPECT_GE(recorder.recorded(), 2);
    EXPECT_LE(recorder.recorded(), 2 * sequences);
    EXPECT_GT(recorder.replays(), 40);
    EXPECT_GT(recorder.rows_ranked(), 100);
  }
}

// What the engine does step by step: the second repeatable step is recorded, asking for times runs
// unrecorded, and both leave the same logits.
TEST(Runner, LogitsOfAReplayAreThoseOfARun) {
  testing::Recorder recorder;
  const model::Model model = load(recorder.backend());
  KvPool pool =
      testing::must(KvPool::create(model.backend(), model.kv_layout(), model.config().layers, 20));
  Plan plan = testing::must(
      Plan::create(model.backend(),
                   {.max_tokens = 64, .max_sequences = 1, .max_pages = 20, .max_kv_length = 310}));
  Runner runner =
      testing::must(Runner::create(model, pool, {.max_tokens = 64, .max_kv_length = 310}));
  const ModeRule rule{.sparse = model.config().sparse};
  Sequence sequence;
  sequence.restart(random_tokens(160, 1), rule, pool);
  ASSERT_TRUE(pool.extend(sequence.pages, 300));
  const auto advance = [&](std::int32_t tokens, model::ForwardTimes* times) {
    const Work work{&sequence, tokens, 1.0f};
    testing::must(plan.build({&work, 1}, rule, pool));
    testing::must(runner.run(plan, times));
  };
  for (const std::int32_t tokens : {64, 64, 32}) {
    advance(tokens, nullptr);
    sequence.advance(tokens, plan.modes()[0]);
  }
  EXPECT_FALSE(plan.repeatable());
  for (int step = 0; step < 40; ++step) {
    sequence.tokens.push_back(step * 7 % kGoldenVocabulary);
    advance(1, nullptr);
    EXPECT_TRUE(plan.repeatable());
    EXPECT_EQ(recorder.replays(), step);  // the first one runs as it is
    EXPECT_EQ(runner.recorded(), step == 0 ? 0 : 1);
    const std::span<const float> row = testing::must(runner.logits(0));
    const std::vector<float> replayed(row.begin(), row.end());
    const TopLogits best = *testing::must(runner.best(0));
    model::ForwardTimes times;
    advance(1, &times);
    EXPECT_EQ(recorder.replays(), step);
    EXPECT_GT(times.mlp, 0);
    const std::span<const float> run = testing::must(runner.logits(0));
    ASSERT_TRUE(std::ranges::equal(run, replayed)) << "step " << step;
    ASSERT_EQ(best.count, TopLogits::kMost);
    EXPECT_EQ(best.logit[0], *std::ranges::max_element(run));
    EXPECT_EQ(best.logit[0], run[static_cast<std::size_t>(best.token[0])]);
    sequence.advance(1, plan.modes()[0]);
  }
}

// An observer is told of every layer in turn, and can have its choice of blocks made again.
TEST(Runner, AnObserverSeesWhatEachLayerChooses) {
  const model::Model model = load(testing::must(open_backend("reference", {.threads = 2})));
  KvPool pool =
      testing::must(KvPool::create(model.backend(), model.kv_layout(), model.config().layers, 20));
  Plan plan = testing::must(
      Plan::create(model.backend(),
                   {.max_tokens = 200, .max_sequences = 1, .max_pages = 20, .max_kv_length = 200}));
  Runner runner =
      testing::must(Runner::create(model, pool, {.max_tokens = 200, .max_kv_length = 200}));
  const ModeRule rule{.sparse = model.config().sparse};
  Sequence sequence;
  sequence.restart(random_tokens(200, 1), rule, pool);
  ASSERT_TRUE(pool.extend(sequence.pages, 200));
  const Work work{&sequence, 200};
  testing::must(plan.build({&work, 1}, rule, pool));

  std::vector<std::int32_t> layers;
  const model::AttentionObserver observer = [&](std::int32_t layer,
                                                const AttentionParams& p) -> Status {
    layers.push_back(layer);
    const auto columns = static_cast<std::size_t>(selection_columns(p));
    std::vector<std::int32_t> chosen(200 * p.pages.layout.kv_heads * columns);
    std::vector<std::byte> workspace(attention_workspace_bytes(model.backend(), p));
    INFLLM_TRY(attention_selection(model.backend(), p, chosen.data(), workspace));
    for (std::size_t row = 0; row < chosen.size() / columns; ++row) {
      const std::span<const std::int32_t> blocks(chosen.data() + row * columns, columns);
      const auto end = std::ranges::find(blocks, -1);
      EXPECT_TRUE(std::is_sorted(blocks.begin(), end)) << layer << " " << row;
      // The own block is the last one; up to the budget all are there.
      const auto own = static_cast<std::int32_t>(row % 200 / 16);
      EXPECT_EQ(*(end - 1), own) << layer << " " << row;
      EXPECT_EQ(end - blocks.begin(), std::min<std::int64_t>(own + 1, blocks.size()));
    }
    return {};
  };
  testing::must(runner.run(plan, nullptr, &observer));
  std::vector<std::int32_t> all(static_cast<std::size_t>(model.config().layers));
  std::iota(all.begin(), all.end(), 0);
  EXPECT_EQ(layers, all);
}

// The same on this machine's devices, with the checkpoint whose layout they can hold: recorded,
// unrecorded, and batched, prompts below, at and above the length from which it is sparse.
class RunnerOn : public ::testing::TestWithParam<std::string> {};

TEST_P(RunnerOn, RecordedStepsGiveTheSameText) {
  const Backend backend = testing::must(open_backend(GetParam(), {.threads = 2}));
  if (backend.kernels->record == nullptr) GTEST_SKIP() << "records nothing";
  const std::filesystem::path folder = testing::source_folder() / "models/needle-32k";
  const model::ModelConfig config = testing::must(model::read_config(folder));
  const auto source = testing::must(model::open_checkpoint(folder));
  const Tokenizer tokenizer = testing::must(Tokenizer::load(folder));
  const auto run = [&](const Backend& on, std::int32_t sequences) {
    const model::Model model = testing::must(model::Model::load(on, config, *source));
    const auto engine = testing::must(
        Engine::create(model, tokenizer, {.context = 4096, .max_sequences = sequences}));
    const std::int32_t lengths[] = {1, 100, 2030, 2047, 2048, 3000};
    std::vector<std::vector<std::int32_t>> tokens(std::size(lengths));
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      Request request{.prompt = random_tokens(lengths[i], 7),
                      .sampling = {.temperature = 0.8f, .top_p = 0.9f, .seed = 3},
                      .max_tokens = 40,
                      .ignore_eos = true};
      if (i % 2 == 0) request.sampling.temperature = 0;
      request.on_done = [&tokens, i](const Completion& done) { tokens[i] = done.tokens; };
      testing::must(engine->submit(std::move(request)));
    }
    while (!engine->idle()) {
      const Status status = engine->step();
      EXPECT_TRUE(status.ok()) << status.message();
      if (!status.ok()) break;
    }
    return tokens;
  };
  for (const std::int32_t sequences : {1, 3}) {
    // Keeps the steps as a function and runs that: launched one by one, with the same limits.
    Kernels unrecorded = *backend.kernels;
    unrecorded.record = [](const Backend&, const std::function<Status()>& body) -> Result<Graph> {
      return Graph{std::make_shared<std::function<Status()>>(body)};
    };
    unrecorded.replay = [](const Backend&, const Graph& graph) {
      return (*static_cast<std::function<Status()>*>(graph.handle.get()))();
    };
    Backend eager = backend;
    eager.kernels = &unrecorded;
    EXPECT_EQ(run(backend, sequences), run(eager, sequences)) << sequences << " at a time";
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, RunnerOn, ::testing::ValuesIn(testing::kernel_backends()),
                         testing::backend_id);

}  // namespace
}  // namespace infllm::engine
