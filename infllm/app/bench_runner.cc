// SPDX-License-Identifier: Apache-2.0
#include "infllm/app/bench_runner.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "infllm/app/signals.h"

namespace infllm::app {

BenchRunner::BenchRunner(const model::Model& model, const Options& options, engine::KvPool pool,
                         engine::Plan plan)
    : model_(&model), options_(options), pool_(std::move(pool)), plan_(std::move(plan)) {
  if (!options.dense) rule_.sparse = model.config().sparse;
  for (std::int32_t i = 0; i < model.config().layers; ++i) layers_.push_back(pool_.layer(i));
}

Result<BenchRunner> BenchRunner::create(const model::Model& model, const Options& options) {
  KvLayout layout = model.kv_layout();
  if (options.dense) layout.pooled_keys = false;
  const auto pages = static_cast<std::int32_t>(layout.config.blocks_in(options.context));
  const std::size_t workspace =
      model.workspace_bytes({.max_tokens = options.chunk_tokens, .max_kv_length = options.context});
  const std::int64_t needed =
      engine::KvPool::bytes(model.backend(), layout, model.config().layers, pages) +
      static_cast<std::int64_t>(workspace);
  if (options.memory_limit > 0 && needed > options.memory_limit) {
    return resource_exhausted(fmt::format(
        "{} tokens need {:.2f} GB of cache and workspace; {:.2f} GB are available; lower -p or -d",
        options.context, needed / 1e9, options.memory_limit / 1e9));
  }
  engine::KvPool pool =
      INFLLM_TRY(engine::KvPool::create(model.backend(), layout, model.config().layers, pages));
  engine::Plan plan = INFLLM_TRY(engine::Plan::create(
      model.backend(),
      {.max_tokens = options.chunk_tokens, .max_sequences = 1, .max_pages = pages}));
  BenchRunner runner(model, options, std::move(pool), std::move(plan));
  runner.workspace_ = INFLLM_TRY(allocate(model.backend(), workspace));
  runner.logits_ = INFLLM_TRY(allocate(model.backend(), model.logits_bytes(1)));
  return runner;
}

// Spread over the vocabulary, and the same in every run.
std::int32_t BenchRunner::made_up_token(std::int32_t position) const {
  return static_cast<std::int32_t>((std::int64_t{position} * 7919 + 13) %
                                   model_->config().vocab_size);
}

Status BenchRunner::start(std::int32_t depth, std::int32_t prompt) {
  std::vector<std::int32_t> tokens;
  for (std::int32_t i = 0; i < depth + prompt; ++i) tokens.push_back(made_up_token(i));
  sequence_.truncate(depth, pool_);
  sequence_.restart(tokens, rule_, pool_);
  INFLLM_CHECK(pool_.extend(sequence_.pages, options_.context), "the pool holds the context");
  BenchRun untimed;
  while (sequence_.cached < depth) {
    INFLLM_TRY(advance(std::min(options_.chunk_tokens, depth - sequence_.cached), untimed));
  }
  return {};
}

Result<BenchRun> BenchRunner::prefill() {
  BenchRun run;
  while (sequence_.uncached() > 0) {
    INFLLM_TRY(advance(std::min(options_.chunk_tokens, sequence_.uncached()), run));
  }
  return run;
}

Result<BenchRun> BenchRunner::decode(std::int32_t count) {
  BenchRun run;
  for (std::int32_t i = 0; i < count; ++i) {
    sequence_.tokens.push_back(made_up_token(sequence_.length()));
    INFLLM_TRY(advance(1, run));
  }
  return run;
}

Status BenchRunner::advance(std::int32_t tokens, BenchRun& run) {
  if (interrupted()) return cancelled("interrupted");
  const auto begin = std::chrono::steady_clock::now();
  const engine::Work work{&sequence_, tokens};
  INFLLM_TRY(plan_.build({&work, 1}, rule_, pool_));
  INFLLM_TRY(model_->forward({.batch = plan_.batch(),
                              .token_ids = plan_.token_ids(),
                              .positions = plan_.positions(),
                              .lengths = plan_.lengths(),
                              .pages = layers_,
                              .logit_rows = plan_.logit_rows(),
                              .num_logits = plan_.num_logits(),
                              .logits = logits_.data(),
                              .workspace = {workspace_.data(), workspace_.bytes()},
                              .times = &run.times}));
  run.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const bool sparse = plan_.modes().front().sparse;
  const std::int32_t from = sequence_.cached;
  sequence_.advance(tokens, plan_.modes().front());
  run.visible.add(from, sequence_.cached, sparse ? &*rule_.sparse : nullptr);
  run.sparse |= sparse;
  return {};
}

}  // namespace infllm::app
