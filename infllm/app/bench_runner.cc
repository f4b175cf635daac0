// SPDX-License-Identifier: Apache-2.0
#include "infllm/app/bench_runner.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "infllm/app/signals.h"
#include "infllm/engine/engine_shape.h"

namespace infllm::app {

BenchRunner::BenchRunner(const model::Model& model, const Options& options, engine::KvPool pool,
                         engine::Plan plan, engine::Runner runner)
    : model_(&model),
      options_(options),
      pool_(std::move(pool)),
      plan_(std::move(plan)),
      runner_(std::move(runner)) {
  if (!options.dense) rule_.sparse = model.config().sparse;
}

Result<BenchRunner> BenchRunner::create(const model::Model& model, const Options& given) {
  Options options = given;
  if (options.chunk_tokens == 0) {
    options.chunk_tokens = engine::default_chunk_tokens(model.backend());
  }
  options.chunk_tokens = std::min(options.chunk_tokens, options.context);
  KvLayout layout = model.kv_layout();
  if (options.dense) layout.pooled_keys = false;
  const auto pages = static_cast<std::int32_t>(layout.config.blocks_in(options.context));
  const model::StepLimits limits{.max_tokens = options.chunk_tokens,
                                 .max_kv_length = options.context};
  const std::int64_t needed =
      engine::KvPool::bytes(model.backend(), layout, model.config().layers, pages) +
      static_cast<std::int64_t>(model.workspace_bytes(limits));
  if (options.memory_limit > 0 && needed > options.memory_limit) {
    return resource_exhausted(fmt::format(
        "{} tokens need {:.2f} GB of cache and workspace; {:.2f} GB are available on {}; lower -p "
        "or -d",
        options.context, needed / 1e9, options.memory_limit / 1e9, model.backend().name));
  }
  engine::KvPool pool =
      INFLLM_TRY(engine::KvPool::create(model.backend(), layout, model.config().layers, pages));
  engine::Plan plan =
      INFLLM_TRY(engine::Plan::create(model.backend(), {.max_tokens = options.chunk_tokens,
                                                        .max_sequences = 1,
                                                        .max_pages = pages,
                                                        .max_kv_length = options.context}));
  engine::Runner runner = INFLLM_TRY(engine::Runner::create(model, pool, limits));
  return BenchRunner(model, options, std::move(pool), std::move(plan), std::move(runner));
}

// Runs of one token, spread over the vocabulary, the same each time.
std::int32_t BenchRunner::made_up_token(std::int32_t position) const {
  return static_cast<std::int32_t>((std::int64_t{position / options_.repeat} * 7919 + 13) %
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
    INFLLM_TRY(advance(std::min(options_.chunk_tokens, depth - sequence_.cached), false, untimed));
  }
  return {};
}

Result<BenchRun> BenchRunner::prefill(bool by_parts) {
  BenchRun run;
  while (sequence_.uncached() > 0) {
    INFLLM_TRY(advance(std::min(options_.chunk_tokens, sequence_.uncached()), by_parts, run));
  }
  return run;
}

Result<BenchRun> BenchRunner::decode(std::int32_t count, bool by_parts) {
  BenchRun run;
  for (std::int32_t i = 0; i < count; ++i) {
    sequence_.tokens.push_back(made_up_token(sequence_.length()));
    INFLLM_TRY(advance(1, by_parts, run));
  }
  return run;
}

Status BenchRunner::advance(std::int32_t tokens, bool by_parts, BenchRun& run) {
  if (interrupted()) return cancelled("interrupted");
  const auto begin = std::chrono::steady_clock::now();
  const engine::Work work{&sequence_, tokens};
  INFLLM_TRY(plan_.build({&work, 1}, rule_, pool_));
  INFLLM_TRY(runner_.run(plan_, by_parts ? &run.times : nullptr));
  if (plan_.num_logits() > 0) INFLLM_TRY(runner_.best(0));
  INFLLM_TRY(synchronize(model_->backend()));
  run.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const bool sparse = plan_.modes().front().sparse;
  const std::int32_t from = sequence_.cached;
  sequence_.advance(tokens, plan_.modes().front());
  run.visible.add(from, sequence_.cached, sparse ? &*rule_.sparse : nullptr);
  run.sparse |= sparse;
  return {};
}

}  // namespace infllm::app
