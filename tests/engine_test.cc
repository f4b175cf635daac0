// SPDX-License-Identifier: Apache-2.0
//
// The whole engine on a small random checkpoint, in float64: chunk sizes, neighbours and cached
// prefixes change no text; pages come back; streams are whole. The sparse lengths are set so low
// that prompts of a hundred tokens are dense, sparse and in between.
#include "infllm/engine/engine.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <atomic>
#include <deque>
#include <random>

#include "infllm/backend/open.h"
#include "infllm/engine/utf8.h"
#include "tests/support/model_rig.h"

namespace infllm::engine {
namespace {

using testing::kGoldenVocabulary;
using testing::random_tokens;

constexpr std::int32_t kDenseLength = 150;

// 256 byte tokens, so that random ids give broken and whole UTF-8, and words.
Tokenizer byte_tokenizer() {
  TokenizerSpec spec;
  for (int byte = 0; byte < 256; ++byte) {
    spec.pieces.push_back(fmt::format("<0x{:02X}>", byte));
    spec.types.push_back(PieceType::kByte);
  }
  for (int i = 256; i < kGoldenVocabulary; ++i) {
    spec.pieces.push_back(fmt::format("\xC3\xA9{}", i));
    spec.types.push_back(PieceType::kNormal);
  }
  spec.byte_fallback = true;
  spec.decoder.byte_fallback = true;
  return Tokenizer::create(std::move(spec)).value();
}

Request greedy(std::vector<std::int32_t> prompt, std::int32_t max_tokens = -1) {
  return {.prompt = std::move(prompt), .sampling = {.temperature = 0}, .max_tokens = max_tokens};
}

class EngineTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    const Backend backend = open_backend("reference", {.threads = 2}).value();
    model_ = new model::Model(
        testing::load_golden(backend, "minicpm-tied", testing::sparse_from(kDenseLength)));
    tokenizer_ = new Tokenizer(byte_tokenizer());
  }
  static void TearDownTestSuite() {
    delete model_;
    delete tokenizer_;
  }

  static std::unique_ptr<Engine> make(EngineOptions options = {}) {
    return Engine::create(*model_, *tokenizer_, options).value();
  }
  static Completion fresh(const Request& request, EngineOptions options = {}) {
    return make(options)->generate(request).value();
  }
  static void expect_all_pages_back(Engine& engine) {
    engine.clear_cache();
    EXPECT_EQ(engine.pool().free_pages(), engine.pool().total_pages());
  }

  static model::Model* model_;
  static Tokenizer* tokenizer_;
};
model::Model* EngineTest::model_ = nullptr;
Tokenizer* EngineTest::tokenizer_ = nullptr;

// Dense, sparse, the border on both sides, an answer that crosses it, and the LongRoPE switch (64).
constexpr std::int32_t kLengths[] = {1, 40, 60, 64, 65, 140, 149, 150, 151, 220};

TEST_F(EngineTest, ChunkSizeChangesNothing) {
  for (const std::int32_t length : kLengths) {
    const Request request = greedy(random_tokens(length, 1), 16);
    const Completion whole = fresh(request, {.chunk_tokens = 512});
    ASSERT_EQ(whole.tokens.size(), 16u);
    for (const std::int32_t chunk : {1, 7, 16, 33, 64}) {
      EXPECT_EQ(fresh(request, {.chunk_tokens = chunk}).tokens, whole.tokens)
          << length << " tokens in chunks of " << chunk;
    }
  }
}

TEST_F(EngineTest, NeighboursChangeNothing) {
  const auto engine = make({.max_sequences = 3, .chunk_tokens = 48});
  std::vector<Completion> together(std::size(kLengths));
  std::vector<Request> requests;
  for (std::size_t i = 0; i < std::size(kLengths); ++i) {
    // Some greedy, some drawn.
    Request request = greedy(random_tokens(kLengths[i], i), static_cast<std::int32_t>(8 + i));
    request.sampling = {.temperature = i % 2 == 0 ? 0.f : 1.f, .seed = i};
    requests.push_back(request);
    request.on_done = [&together, i](const Completion& done) { together[i] = done; };
    const Status status = engine->submit(std::move(request));
    ASSERT_TRUE(status.ok()) << status.message();
  }
  while (!engine->idle()) ASSERT_TRUE(engine->step().ok());
  for (std::size_t i = 0; i < std::size(kLengths); ++i) {
    const Completion alone = fresh(requests[i]);
    EXPECT_EQ(together[i].tokens, alone.tokens) << "request " << i;
    EXPECT_EQ(together[i].text, alone.text) << "request " << i;
  }
  expect_all_pages_back(*engine);
}

TEST_F(EngineTest, CachedPrefixChangesNothing) {
  std::mt19937 random(5);
  const auto engine = make();
  const std::vector<std::int32_t> base = random_tokens(300, 9);
  bool has_reused = false;
  for (int turn = 0; turn < 25; ++turn) {
    std::vector<std::int32_t> prompt(base.begin(), base.begin() + 1 + random() % 250);
    for (std::int32_t id : random_tokens(random() % 20, turn)) prompt.push_back(id);
    const Request request = greedy(prompt, 12);
    const Completion reused = engine->generate(request).value();
    EXPECT_EQ(reused.tokens, fresh(request).tokens)
        << "turn " << turn << ", " << reused.timings.reused_tokens << " of " << prompt.size()
        << " re-used";
    has_reused |= reused.timings.reused_tokens > 0;
  }
  EXPECT_TRUE(has_reused);
}

// Questions about one document, asked together: the first computes it, the others wait for it and
// borrow its pages, of which they copy what they will write.
TEST_F(EngineTest, DocumentIsComputedOnceForQuestionsThatComeTogether) {
  for (const std::int32_t length : {40, 100, 160, 220, 224}) {  // dense and sparse
    for (const std::int32_t sequences : {2, 5}) {
      // Room for one whole context and a little for each of the others: a page more or less to wait
      // for, never a different text.
      const auto engine = make({.context = 300,
                                .max_sequences = sequences,
                                .cache_tokens = 300 + (sequences - 1) * 80,
                                .chunk_tokens = 48});
      const std::vector<std::int32_t> document = random_tokens(length, 17);
      std::vector<Request> requests;
      std::vector<Completion> together(7);
      for (std::uint32_t i = 0; i < together.size(); ++i) {
        std::vector<std::int32_t> prompt = document;
        prompt.push_back(static_cast<std::int32_t>(i));
        for (const std::int32_t id : random_tokens(3 * i, i)) prompt.push_back(id);
        requests.push_back(greedy(prompt, 10));
        Request request = requests.back();
        request.on_done = [&together, i](const Completion& done) { together[i] = done; };
        ASSERT_TRUE(engine->submit(std::move(request)).ok());
      }
      while (!engine->idle()) ASSERT_TRUE(engine->step().ok());
      for (std::size_t i = 0; i < together.size(); ++i) {
        SCOPED_TRACE(fmt::format("{} tokens, {} at a time, question {}", length, sequences, i));
        EXPECT_EQ(together[i].tokens, fresh(requests[i]).tokens);
        EXPECT_EQ(together[i].timings.reused_tokens, i == 0 ? 0 : length);
      }
      expect_all_pages_back(*engine);
    }
  }
}

// Requests that share beginnings of every length come, run, end early and leave their caches to be
// cut, lent on and evicted, in a cache that is too small for all.
TEST_F(EngineTest, LentPagesChangeNothing) {
  std::mt19937 random(11);
  const std::vector<std::int32_t> base = random_tokens(260, 21);
  const auto engine =
      make({.context = 300, .max_sequences = 4, .cache_tokens = 700, .chunk_tokens = 64});
  struct Turn {
    Request request;
    Completion done;
    std::atomic<bool> cancelled = false;
  };
  std::deque<Turn> turns;
  std::int32_t reused = 0;
  for (int i = 0; i < 60; ++i) {
    std::vector<std::int32_t> prompt(base.begin(), base.begin() + 1 + random() % base.size());
    for (std::int32_t id : random_tokens(random() % 20, i % 7)) prompt.push_back(id);
    Turn& turn = turns.emplace_back();
    turn.request = greedy(prompt, static_cast<std::int32_t>(1 + random() % 14));
    Request request = turn.request;
    request.cancelled = &turn.cancelled;
    request.on_done = [&turn](const Completion& done) { turn.done = done; };
    ASSERT_TRUE(engine->submit(std::move(request)).ok());
    for (std::uint32_t steps = random() % 5; steps > 0; --steps) ASSERT_TRUE(engine->step().ok());
    if (random() % 6 == 0) turns[random() % turns.size()].cancelled = true;
  }
  while (!engine->idle()) ASSERT_TRUE(engine->step().ok());
  for (std::size_t i = 0; i < turns.size(); ++i) {
    const Completion& done = turns[i].done;
    reused += done.timings.reused_tokens > 64 ? 1 : 0;
    const std::vector<std::int32_t> alone = fresh(turns[i].request).tokens;
    ASSERT_LE(done.tokens.size(), alone.size());
    EXPECT_TRUE(done.reason == FinishReason::kCancelled || done.tokens.size() == alone.size());
    EXPECT_TRUE(std::ranges::equal(done.tokens, std::span(alone).first(done.tokens.size())))
        << "request " << i;
  }
  EXPECT_GT(reused, 10);
  expect_all_pages_back(*engine);
}

// Nobody who needs nothing of it waits behind a document that is being computed.
TEST_F(EngineTest, OthersPassWhoWaitsForABeginning) {
  const auto engine = make({.max_sequences = 3, .chunk_tokens = 32});
  const std::vector<std::int32_t> document = random_tokens(220, 1);
  std::vector<int> order;
  const auto ask = [&](int name, std::vector<std::int32_t> prompt) {
    Request request = greedy(std::move(prompt), 2);
    request.on_done = [&order, name](const Completion&) { order.push_back(name); };
    ASSERT_TRUE(engine->submit(std::move(request)).ok());
  };
  ask(0, document);
  ASSERT_TRUE(engine->step().ok());
  std::vector<std::int32_t> longer = document;
  longer.push_back(7);
  ask(1, longer);
  ask(2, random_tokens(8, 2));
  while (!engine->idle()) ASSERT_TRUE(engine->step().ok());
  EXPECT_EQ(order, (std::vector<int>{2, 0, 1}));
}

TEST_F(EngineTest, ConversationReusesAllOfThePreviousTurn) {
  const auto engine = make();
  std::vector<std::int32_t> prompt = random_tokens(200, 3);
  const Completion first = engine->generate(greedy(prompt, 10)).value();
  prompt.insert(prompt.end(), first.tokens.begin(), first.tokens.end());
  const std::vector<std::int32_t> more = random_tokens(5, 4);
  prompt.insert(prompt.end(), more.begin(), more.end());
  const Completion second = engine->generate(greedy(prompt, 4)).value();
  EXPECT_EQ(second.timings.reused_tokens, 209);  // the last answer token was never computed
}

TEST_F(EngineTest, DenseOptionIsTheModelWithoutSparseConfig) {
  const Backend backend = open_backend("reference", {.threads = 2}).value();
  const model::Model plain = testing::load_golden(backend, "minicpm-tied");
  const Request request = greedy(random_tokens(220, 1), 16);
  const Completion dense = fresh(request, {.dense = true});
  EXPECT_EQ(dense.tokens,
            Engine::create(plain, *tokenizer_, {}).value()->generate(request).value().tokens);
  EXPECT_EQ(dense.timings.prompt_visible.share(), 1);
  const Completion sparse = fresh(request);
  EXPECT_LT(sparse.timings.prompt_visible.share(), 1);
  EXPECT_NE(sparse.tokens, dense.tokens) << "this test needs a prompt on which they differ";
}

TEST_F(EngineTest, StreamIsTheWholeTextInValidPieces) {
  for (std::uint32_t seed = 0; seed < 5; ++seed) {
    std::string streamed;
    const Completion done = fresh({.prompt = random_tokens(30, seed),
                                   .sampling = {.temperature = 5, .seed = seed},
                                   .max_tokens = 100,
                                   .on_text = [&streamed](std::string_view text) {
                                     EXPECT_TRUE(utf8_valid(text));
                                     streamed += text;
                                   }});
    EXPECT_EQ(streamed, done.text);
    EXPECT_EQ(done.text, tokenizer_->decode(done.tokens));
  }
}

TEST_F(EngineTest, StopStringEndsTheTextBeforeIt) {
  Request request = greedy(random_tokens(30, 2), 60);
  const Completion whole = fresh(request);
  for (std::size_t at = 0; at + 3 < whole.text.size(); at += 5) {
    request.stop = {"never there", whole.text.substr(at, 3)};
    const std::size_t expected = whole.text.find(request.stop[1]);
    std::string streamed;
    request.on_text = [&streamed](std::string_view text) { streamed += text; };
    const Completion stopped = fresh(request);
    EXPECT_EQ(stopped.text, whole.text.substr(0, expected));
    EXPECT_EQ(streamed, stopped.text);
    EXPECT_EQ(stopped.reason, FinishReason::kStopString);
  }
}

TEST_F(EngineTest, EndOfSequenceTokenEndsTheAnswerUnlessIgnored) {
  Request request = greedy(random_tokens(30, 2), 20);
  const Completion whole = fresh(request);
  request.eos = {whole.tokens[7]};
  const auto first = std::ranges::find(whole.tokens, whole.tokens[7]) - whole.tokens.begin();
  const Completion ended = fresh(request);
  EXPECT_EQ(ended.reason, FinishReason::kStop);
  EXPECT_EQ(std::ssize(ended.tokens), first);
  request.ignore_eos = true;
  EXPECT_EQ(fresh(request).tokens, whole.tokens);
}

TEST_F(EngineTest, CancellingGivesPagesBackInThePromptAndInTheAnswer) {
  for (const int steps_before : {0, 1, 2, 8}) {
    std::atomic<bool> cancelled = false;
    const auto engine = make({.max_sequences = 2, .chunk_tokens = 64});
    std::optional<Completion> done;
    bool other_done = false;
    ASSERT_TRUE(engine
                    ->submit({.prompt = random_tokens(220, 1),
                              .sampling = {.temperature = 0},
                              .cancelled = &cancelled,
                              .on_done = [&done](const Completion& c) { done = c; }})
                    .ok());
    ASSERT_TRUE(engine
                    ->submit({.prompt = random_tokens(20, 1),
                              .max_tokens = 30,
                              .on_done =
                                  [&other_done](const Completion& c) {
                                    other_done = c.reason == FinishReason::kLength;
                                  }})
                    .ok());
    for (int i = 0; i < steps_before; ++i) ASSERT_TRUE(engine->step().ok());
    EXPECT_FALSE(done);
    cancelled = true;
    ASSERT_TRUE(engine->step().ok());
    ASSERT_TRUE(done) << "not at once, after " << steps_before << " steps";
    EXPECT_EQ(done->reason, FinishReason::kCancelled);
    while (!engine->idle()) ASSERT_TRUE(engine->step().ok());
    EXPECT_TRUE(other_done);
    expect_all_pages_back(*engine);
  }
}

TEST_F(EngineTest, ContextBoundsPromptAndAnswer) {
  const auto engine = make({.context = 50});
  EXPECT_EQ(engine->submit({.prompt = random_tokens(50, 1)}).code(), StatusCode::kInvalidArgument);
  const Completion done = engine->generate({.prompt = random_tokens(45, 1)}).value();
  EXPECT_EQ(done.reason, FinishReason::kLength);
  EXPECT_EQ(done.tokens.size(), 5u);
}

TEST_F(EngineTest, RefusesWhatCannotWork) {
  const auto engine = make();
  EXPECT_EQ(engine->submit({}).message(), "the prompt is empty");
  const Status beyond = engine->submit({.prompt = {1, kGoldenVocabulary}});
  EXPECT_EQ(beyond.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(beyond.message().find("token 320"), std::string::npos) << beyond.message();
  EXPECT_TRUE(engine->idle());

  const auto small = Engine::create(*model_, *tokenizer_, {.memory_limit = 1000});
  ASSERT_FALSE(small.ok());
  EXPECT_EQ(small.status().code(), StatusCode::kResourceExhausted);
  EXPECT_NE(small.status().message().find("lower --ctx-size"), std::string::npos);
  EXPECT_FALSE(Engine::create(*model_, *tokenizer_, {.chunk_tokens = -1}).ok());
  EXPECT_EQ(Engine::create(*model_, *tokenizer_, {.context = 300, .cache_tokens = 299})
                .status()
                .message(),
            "engine: a cache of 299 tokens, expected at least a context's 300, or 0 for 1 of them");
}

TEST_F(EngineTest, MemoryIsComputedBeforeItIsTaken) {
  const EngineOptions options{.context = 300, .max_sequences = 2};
  const EngineMemory memory = engine_shape(*model_, options).value().memory;
  EXPECT_EQ(make(options)->pool().bytes(), memory.cache);
  EXPECT_EQ(make(options)->pool().total_pages(), 2 * 19);
  const EngineOptions less{.context = 300, .max_sequences = 2, .cache_tokens = 400};
  EXPECT_EQ(make(less)->pool().total_pages(), 25);
}

TEST_F(EngineTest, TimingsAddUp) {
  const auto engine = make({.chunk_tokens = 50});
  std::vector<std::int32_t> progress;
  const Completion done = engine
                              ->generate({.prompt = random_tokens(220, 1),
                                          .max_tokens = 9,
                                          .on_prompt =
                                              [&progress](std::int32_t count, std::int32_t total) {
                                                EXPECT_EQ(total, 220);
                                                progress.push_back(count);
                                              }})
                              .value();
  EXPECT_EQ(progress, (std::vector<std::int32_t>{48, 96, 144, 192, 220}));
  const Timings& t = done.timings;
  EXPECT_EQ(t.prompt_tokens, 220);
  EXPECT_EQ(t.generated_tokens, 9);
  EXPECT_EQ(t.eval_tokens(), 8);
  EXPECT_EQ(t.prompt_visible.causal, 220 * 221 / 2);
  EXPECT_EQ(t.eval_visible.causal, 8 * 220 + 8 * 9 / 2);
  EXPECT_GT(t.prompt_times.attention.score, 0);
  EXPECT_GT(t.prompt_times.attention.attend, 0);
  EXPECT_LE(t.prompt_times.total(), t.prompt_seconds);
  EXPECT_LE(t.eval_times.total(), t.eval_seconds);
}

}  // namespace
}  // namespace infllm::engine
