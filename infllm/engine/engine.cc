// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/engine.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace infllm::engine {
namespace {

double seconds_between(std::chrono::steady_clock::time_point from,
                       std::chrono::steady_clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

std::string_view name_of(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kStopString:
      return "stop_string";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "cancelled";
  }
  return "?";
}

struct Engine::Slot {
  Sequence sequence;
  bool busy = false;
  Clock::time_point last_used;
};

struct Engine::Active {
  Request request;
  Sampler sampler;
  Answer answer;
  Completion completion;
  std::int32_t max_tokens = 0;
  Slot* slot = nullptr;
  bool done = false;
  bool has_first_token = false;
  Clock::time_point submitted, started, first_token;

  Active(Request&& from, const Tokenizer& tokenizer)
      : request(std::move(from)),
        sampler(request.sampling),
        answer(tokenizer, request.stop),
        submitted(Clock::now()) {}

  void stop_clocks() {
    const Clock::time_point now = Clock::now();
    if (slot == nullptr) started = now;
    if (!has_first_token) first_token = now;
    Timings& timings = completion.timings;
    timings.wait_seconds = seconds_between(submitted, started);
    timings.prompt_seconds = seconds_between(started, first_token);
    timings.eval_seconds = seconds_between(first_token, now);
  }
};

Engine::Engine(const model::Model& model, const Tokenizer& tokenizer, const EngineShape& shape,
               KvPool pool, Plan plan, Runner runner)
    : model_(model),
      tokenizer_(tokenizer),
      options_(shape.options),
      rule_(shape.rule),
      pool_(std::move(pool)),
      plan_(std::move(plan)),
      runner_(std::move(runner)) {
  for (std::int32_t i = 0; i < options_.max_sequences; ++i) {
    slots_.push_back(std::make_unique<Slot>());
  }
}

Engine::~Engine() = default;

Result<std::unique_ptr<Engine>> Engine::create(const model::Model& model,
                                               const Tokenizer& tokenizer,
                                               const EngineOptions& options) {
  const Backend& backend = model.backend();
  const EngineShape shape = INFLLM_TRY(engine_shape(model, options));
  KvPool pool =
      INFLLM_TRY(KvPool::create(backend, shape.layout, model.config().layers, shape.pages));
  Plan plan = INFLLM_TRY(Plan::create(backend, shape.plan_limits));
  Runner runner = INFLLM_TRY(Runner::create(model, pool, shape.step_limits));
  return std::unique_ptr<Engine>(
      new Engine(model, tokenizer, shape, std::move(pool), std::move(plan), std::move(runner)));
}

Status Engine::submit(Request request) {
  const auto length = static_cast<std::int64_t>(request.prompt.size());
  if (length == 0) return invalid_argument("the prompt is empty");
  if (length >= options_.context) {
    return invalid_argument(
        fmt::format("the prompt has {} tokens, but the context holds {} with at least one of the "
                    "answer; shorten it or raise --ctx-size",
                    length, options_.context));
  }
  for (const std::int32_t id : request.prompt) {
    if (id < 0 || id >= model_.config().vocab_size) {
      return invalid_argument(fmt::format(
          "the prompt has token {}, but the model's vocabulary ends at {}; do tokenizer and model "
          "belong together?",
          id, model_.config().vocab_size - 1));
    }
  }
  INFLLM_TRY(engine::check(request.sampling));
  INFLLM_TRY(StopStrings::check(request.stop));
  const std::int32_t room = options_.context - static_cast<std::int32_t>(length);
  auto active = std::make_unique<Active>(std::move(request), tokenizer_);
  active->max_tokens =
      active->request.max_tokens < 0 ? room : std::clamp(active->request.max_tokens, 1, room);
  waiting_.push_back(std::move(active));
  return {};
}

Result<Completion> Engine::generate(Request request) {
  std::optional<Completion> result;
  request.on_done = [&result, on_done = std::move(request.on_done)](const Completion& done) {
    result = done;
    if (on_done) on_done(done);
  };
  INFLLM_TRY(submit(std::move(request)));
  while (!result) INFLLM_TRY(step());
  return *std::move(result);
}

Status Engine::step() {
  drop_cancelled();
  Status status = admit();
  if (status.ok()) status = advance();
  if (!status.ok()) drop_running();
  return status;
}

Status Engine::advance() {
  std::vector<Active*> owners;
  const std::vector<Work> work = schedule_step(owners);
  if (work.empty()) return {};
  model::ForwardTimes times;
  INFLLM_TRY(forward(work, options_.measure ? &times : nullptr));
  INFLLM_TRY(publish(work, owners, times));
  std::erase_if(running_, [](const auto& active) { return active->done; });
  return {};
}

// Cancelled requests leave before the step; those that wait never had pages.
void Engine::drop_cancelled() {
  const auto is_cancelled = [](const Active& active) {
    return active.request.cancelled != nullptr && active.request.cancelled->load();
  };
  for (const auto& active : running_) {
    if (is_cancelled(*active)) finish(*active, FinishReason::kCancelled);
  }
  std::erase_if(running_, [](const auto& active) { return active->done; });
  for (auto& active : waiting_) {
    if (is_cancelled(*active)) finish(*active, FinishReason::kCancelled);
  }
  std::erase_if(waiting_, [](const auto& active) { return active->done; });
}

// First come, first served: nobody overtakes a request that waits for pages.
Status Engine::admit() {
  for (auto next = waiting_.begin(); next != waiting_.end();) {
    Active& active = **next;
    Slot* slot = choose_slot(active.request.prompt);
    if (slot == nullptr) return {};
    if (awaits_prefix(active.request.prompt)) {
      ++next;
      continue;
    }
    begin(*slot, active.request.prompt);
    if (!INFLLM_TRY(make_room(*slot, slot->sequence.length() + active.max_tokens))) return {};
    slot->busy = true;
    active.slot = slot;
    active.started = Clock::now();
    Timings& timings = active.completion.timings;
    timings.prompt_tokens = slot->sequence.prompt_length;
    timings.reused_tokens = slot->sequence.cached;
    running_.push_back(std::move(*next));
    next = waiting_.erase(next);
  }
  return {};
}

// Whether this prompt begins, for a block or more, like one that is just being computed.
bool Engine::awaits_prefix(const std::vector<std::int32_t>& prompt) const {
  std::int32_t now = 0;
  std::int32_t soon = 0;
  for (const auto& slot : slots_) {
    now = std::max(now, reusable_prefix(slot->sequence, prompt, rule_));
    if (!slot->busy || slot->sequence.cached >= slot->sequence.prompt_length) continue;
    soon = std::max(soon, coming_prefix(slot->sequence, prompt, rule_));
  }
  return soon > now && soon >= pool_.page_tokens();
}

// The idle slot that has most of the prompt cached; among equals the one used least recently.
Engine::Slot* Engine::choose_slot(const std::vector<std::int32_t>& prompt) {
  Slot* best = nullptr;
  std::int32_t best_prefix = -1;
  for (const auto& slot : slots_) {
    if (slot->busy) continue;
    const std::int32_t prefix = reusable_prefix(slot->sequence, prompt, rule_);
    const bool is_better =
        prefix > best_prefix || (prefix == best_prefix && slot->last_used < best->last_used);
    if (!is_better) continue;
    best = slot.get();
    best_prefix = prefix;
  }
  return best;
}

// From the slot's own cache, or from that of another one if it has a block more of the prompt.
void Engine::begin(Slot& slot, const std::vector<std::int32_t>& prompt) {
  const Slot* source = &slot;
  std::int32_t most = reusable_prefix(slot.sequence, prompt, rule_) + pool_.page_tokens() - 1;
  for (const auto& other : slots_) {
    const std::int32_t prefix = reusable_prefix(other->sequence, prompt, rule_);
    if (prefix <= most) continue;
    source = other.get();
    most = prefix;
  }
  if (source == &slot) {
    slot.sequence.restart(prompt, rule_, pool_);
  } else {
    slot.sequence.fork(source->sequence, prompt, rule_, pool_);
  }
}

// Takes pages from idle slots' caches, least recently used first, until `slot` can hold `tokens`
// and has to itself what it will write.
Result<bool> Engine::make_room(Slot& slot, std::int64_t tokens) {
  std::vector<std::int32_t>& pages = slot.sequence.pages;
  const std::int64_t settled = pool_.settled_pages(slot.sequence.cached);
  while (!INFLLM_TRY(pool_.own(pages, settled)) || !pool_.extend(pages, tokens)) {
    Slot* oldest = nullptr;
    for (const auto& other : slots_) {
      if (other->busy || other.get() == &slot || other->sequence.pages.empty()) continue;
      if (oldest == nullptr || other->last_used < oldest->last_used) oldest = other.get();
    }
    if (oldest == nullptr) return false;
    oldest->sequence.truncate(0, pool_);
  }
  return true;
}

std::vector<Work> Engine::schedule_step(std::vector<Active*>& owners) const {
  std::vector<Pending> pending;
  for (const auto& active : running_) {
    const Sequence& sequence = active->slot->sequence;
    pending.push_back({.cached = sequence.cached, .uncached = sequence.uncached()});
  }
  const std::vector<std::int32_t> tokens =
      schedule(pending, {.chunk_tokens = options_.chunk_tokens, .block_size = pool_.page_tokens()});
  std::vector<Work> work;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] == 0) continue;
    work.push_back(
        {&running_[i]->slot->sequence, tokens[i], running_[i]->request.sampling.temperature});
    owners.push_back(running_[i].get());
  }
  return work;
}

Status Engine::forward(const std::vector<Work>& work, model::ForwardTimes* times) {
  INFLLM_TRY(plan_.build(work, rule_, pool_));
  // A step that could be recorded is worth more than its times.
  return runner_.run(plan_, plan_.repeatable() ? nullptr : times);
}

Status Engine::publish(const std::vector<Work>& work, const std::vector<Active*>& owners,
                       const model::ForwardTimes& times) {
  std::int32_t row = 0;
  for (std::size_t i = 0; i < work.size(); ++i) {
    Active& active = *owners[i];
    Sequence& sequence = active.slot->sequence;
    Timings& timings = active.completion.timings;
    const bool wants_logits = work[i].wants_logits();
    const bool in_prompt = sequence.cached < sequence.prompt_length;
    const Mode mode = plan_.modes()[i];
    const std::int32_t from = sequence.cached;
    sequence.advance(work[i].tokens, mode);
    (in_prompt ? timings.prompt_visible : timings.eval_visible)
        .add(from, sequence.cached, mode.sparse ? &*rule_.sparse : nullptr);
    accumulate(times, in_prompt ? timings.prompt_times : timings.eval_times);
    if (in_prompt && active.request.on_prompt) {
      active.request.on_prompt(sequence.cached, sequence.prompt_length);
    }
    if (!wants_logits) continue;
    INFLLM_TRY(publish_token(active, row++));
  }
  return {};
}

// From the best logits if they decide it, else from the whole row.
Result<std::int32_t> Engine::draw(Active& active, std::int32_t row) {
  const Sequence& sequence = active.slot->sequence;
  if (const TopLogits* best = INFLLM_TRY(runner_.best(row)); best != nullptr) {
    const auto token = INFLLM_TRY(active.sampler.sample(*best, sequence.tokens));
    if (token) return *token;
  }
  const std::span<const float> logits = INFLLM_TRY(runner_.logits(row));
  return active.sampler.sample(logits, sequence.tokens, sequence.prompt_length);
}

Status Engine::publish_token(Active& active, std::int32_t row) {
  const Request& request = active.request;
  Completion& completion = active.completion;
  Sequence& sequence = active.slot->sequence;
  const std::int32_t token = INFLLM_TRY(draw(active, row));
  if (!std::exchange(active.has_first_token, true)) active.first_token = Clock::now();
  if (!request.ignore_eos && std::ranges::count(request.eos, token) > 0) {
    finish(active, FinishReason::kStop);
    return {};
  }
  sequence.tokens.push_back(token);
  completion.tokens.push_back(token);
  completion.timings.generated_tokens += 1;
  const std::string text = active.answer.push(token);
  completion.text += text;
  if (request.on_text && !text.empty()) request.on_text(text);
  if (active.answer.stopped()) {
    finish(active, FinishReason::kStopString);
  } else if (completion.timings.generated_tokens == active.max_tokens) {
    finish(active, FinishReason::kLength);
  }
  return {};
}

// After a failure nobody knows what the pages hold.
void Engine::drop_running() {
  for (const auto& active : running_) active->slot->busy = false;
  running_.clear();
  clear_cache();
}

void Engine::finish(Active& active, FinishReason reason) {
  Completion& completion = active.completion;
  completion.reason = reason;
  active.done = true;
  active.stop_clocks();
  const std::string rest = active.answer.finish();
  completion.text += rest;
  if (active.request.on_text && !rest.empty()) active.request.on_text(rest);
  if (active.slot != nullptr) {
    active.slot->busy = false;
    active.slot->last_used = Clock::now();
    active.slot->sequence.truncate(active.slot->sequence.cached, pool_);
  }
  if (active.request.on_done) active.request.on_done(completion);
}

void Engine::clear_cache() {
  for (const auto& slot : slots_) {
    if (!slot->busy) slot->sequence.truncate(0, pool_);
  }
}

}  // namespace infllm::engine
