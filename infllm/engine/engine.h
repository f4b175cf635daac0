// SPDX-License-Identifier: Apache-2.0
//
// From token ids to text, for one request or many at a time. A step is three verbs: schedule,
// forward, publish (sample, stream, finish).
//
//   std::unique_ptr<Engine> engine = INFLLM_TRY(Engine::create(model, tokenizer, {}));
//   Completion answer = INFLLM_TRY(engine->generate({.prompt = ids, .on_text = print}));
//
//   engine->submit({.prompt = first, .on_done = ...});      // or several, batched continuously,
//   engine->submit({.prompt = second, .on_done = ...});     // whose chunks and tokens share steps:
//   while (!engine->idle()) INFLLM_TRY(engine->step());
//
// A request's text follows from its prompt, its sampling parameters and its seed. Neighbours, the
// chunk size and what was cached before have no part in it but for rounding: docs/numerics.md says
// where they have none at all.
//
// All memory is allocated by create(): cache, workspace, logits. A request gets the pages it can
// ever need before it starts, so nothing runs out half-way; it waits until they are free.
//
// Prompts that begin the same are computed once. What a finished request leaves in the cache serves
// the next such prompt, until somebody needs the pages; a running one lends its pages to those that
// come while it runs. Who shares a beginning that is just being computed waits for it, and others
// pass by.
//
// Not thread-safe, apart from Request::cancelled.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "infllm/engine/answer.h"
#include "infllm/engine/engine_shape.h"
#include "infllm/engine/kv_pool.h"
#include "infllm/engine/plan.h"
#include "infllm/engine/runner.h"
#include "infllm/engine/sampler.h"
#include "infllm/engine/scheduler.h"
#include "infllm/engine/sequence.h"
#include "infllm/engine/timings.h"
#include "infllm/engine/tokenizer.h"
#include "infllm/model/model.h"

namespace infllm::engine {

enum class FinishReason { kStop, kStopString, kLength, kCancelled };
std::string_view name_of(FinishReason reason);  // "stop", "stop_string", "length", "cancelled"

struct Completion {
  std::string text;                  // valid UTF-8, without the stop string
  std::vector<std::int32_t> tokens;  // generated, without the end-of-sequence token
  FinishReason reason = FinishReason::kStop;
  Timings timings;
};

struct Request {
  std::vector<std::int32_t> prompt;
  SamplingParams sampling;
  std::int32_t max_tokens = -1;   // of the answer; -1: as many as the context holds
  std::vector<std::string> stop;  // the answer ends before the first of them
  std::vector<std::int32_t> eos;  // tokens that end the answer
  bool ignore_eos = false;
  const std::atomic<bool>* cancelled = nullptr;  // looked at before every step
  // Called from step(). Text comes in valid UTF-8 pieces whose concatenation is Completion::text.
  std::function<void(std::string_view)> on_text;
  std::function<void(std::int32_t done, std::int32_t total)> on_prompt;  // after every chunk
  std::function<void(const Completion&)> on_done;
};

class Engine {
 public:
  // Keeps references to model and tokenizer. kResourceExhausted says what does not fit.
  static Result<std::unique_ptr<Engine>> create(const model::Model& model,
                                                const Tokenizer& tokenizer,
                                                const EngineOptions& options);
  ~Engine();

  // kInvalidArgument for a prompt that is empty, too long or has ids beyond the vocabulary, and for
  // sampling parameters and stop strings out of range.
  Status submit(Request request);
  // Advances every request that it can. On failure, all running requests are dropped.
  Status step();
  bool idle() const { return waiting_.empty() && running_.empty(); }

  // submit() and step() until this request is done.
  Result<Completion> generate(Request request);

  // Forgets what finished requests left in the cache.
  void clear_cache();

  std::int32_t context() const { return options_.context; }
  const KvPool& pool() const { return pool_; }
  const ModeRule& mode_rule() const { return rule_; }

 private:
  struct Slot;    // a sequence and whether a request runs on it
  struct Active;  // a request that was submitted
  using Clock = std::chrono::steady_clock;

  Engine(const model::Model& model, const Tokenizer& tokenizer, const EngineShape& shape,
         KvPool pool, Plan plan, Runner runner);

  void drop_cancelled();
  Status admit();
  bool awaits_prefix(const std::vector<std::int32_t>& prompt) const;
  Slot* choose_slot(const std::vector<std::int32_t>& prompt);
  void begin(Slot& slot, const std::vector<std::int32_t>& prompt);
  Result<bool> make_room(Slot& slot, std::int64_t tokens);

  Status advance();
  std::vector<Work> schedule_step(std::vector<Active*>& owners) const;
  Status forward(const std::vector<Work>& work, model::ForwardTimes* times);
  Status publish(const std::vector<Work>& work, const std::vector<Active*>& owners,
                 const model::ForwardTimes& times);
  Status publish_token(Active& active, std::int32_t row);
  Result<std::int32_t> draw(Active& active, std::int32_t row);
  void drop_running();
  void finish(Active& active, FinishReason reason);

  const model::Model& model_;
  const Tokenizer& tokenizer_;
  EngineOptions options_;
  ModeRule rule_;
  KvPool pool_;
  Plan plan_;
  Runner runner_;
  std::vector<std::unique_ptr<Slot>> slots_;
  std::deque<std::unique_ptr<Active>> waiting_;
  std::vector<std::unique_ptr<Active>> running_;  // in order of arrival
};

}  // namespace infllm::engine
