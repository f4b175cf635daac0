// SPDX-License-Identifier: Apache-2.0
#include "infllm/app/bench_runner.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <random>

#include "infllm/app/signals.h"
#include "infllm/engine/engine_shape.h"
#include "infllm/ops/compress.h"
#include "infllm/ops/kernels.h"
#include "infllm/ops/overlap.h"
#include "infllm/ops/transformer.h"

namespace infllm::app {

namespace {

// Normally distributed numbers of the activation type: a table's rows, looked up one by one.
Result<Buffer> normal_rows(const Backend& backend, std::int64_t rows, std::int64_t width) {
  std::vector<float> numbers(static_cast<std::size_t>(rows * width));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (float& x : numbers) x = normal(random);
  std::vector<std::int32_t> each(static_cast<std::size_t>(rows));
  std::iota(each.begin(), each.end(), 0);
  const std::size_t id_bytes = each.size() * sizeof(each[0]);
  const EmbeddingTable table = INFLLM_TRY(
      upload_table(backend, TensorView::matrix(numbers.data(), DType::kF32, rows, width)));
  const Buffer ids = INFLLM_TRY(allocate(backend, id_bytes));
  INFLLM_TRY(copy_in(backend, ids.data(), each.data(), id_bytes));
  const std::int64_t bytes = rows * width * size_of(backend.kernels->activation);
  Buffer buffer = INFLLM_TRY(allocate(backend, static_cast<std::size_t>(bytes)));
  INFLLM_TRY(embed(
      backend,
      {.table = &table, .tokens = rows, .token_ids = ids.as<std::int32_t>(), .y = buffer.data()}));
  INFLLM_TRY(synchronize(backend));  // before the table goes
  return buffer;
}

}  // namespace

BenchRunner::BenchRunner(const model::Model& model, const Options& options, engine::KvPool pool,
                         engine::Plan plan, engine::Runner runner)
    : model_(&model),
      options_(options),
      pool_(std::move(pool)),
      plan_(std::move(plan)),
      runner_(std::move(runner)),
      rule_(engine::mode_rule(model.config(), options.dense)) {}

Result<BenchRunner> BenchRunner::create(const model::Model& model, const Options& given) {
  Options options = given;
  if (options.chunk_tokens == 0) {
    options.chunk_tokens = engine::default_chunk_tokens(model.backend());
  }
  options.chunk_tokens = std::min(options.chunk_tokens, options.context);
  KvLayout layout = model.config().kv_layout(options.kv_dtype.value_or(model.kv_dtype()));
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
  if (options_.fill && sequence_.cached < depth) INFLLM_TRY(fill(depth));
  BenchRun untimed;
  while (sequence_.cached < depth) {
    INFLLM_TRY(advance(std::min(options_.chunk_tokens, depth - sequence_.cached), false, untimed));
  }
  return {};
}

// The same rows for every layer and, from another row on, for every chunk.
Status BenchRunner::fill(std::int32_t depth) {
  const Backend& backend = model_->backend();
  const KvLayout& layout = pool_.layout();
  const std::int64_t width = std::int64_t{layout.kv_heads} * layout.head_dim;
  const std::int64_t rows = options_.chunk_tokens;
  const Buffer made_up = INFLLM_TRY(normal_rows(backend, 2 * rows, width));
  const std::int64_t row_bytes = width * size_of(backend.kernels->activation);
  while (sequence_.cached < depth) {
    const std::int32_t tokens = std::min(options_.chunk_tokens, depth - sequence_.cached);
    const std::byte* const keys = made_up.data() + sequence_.cached / rows * 37 % rows * row_bytes;
    const engine::Work work{&sequence_, tokens};
    INFLLM_TRY(plan_.build({&work, 1}, rule_, pool_));
    for (std::int32_t i = 0; i < model_->config().layers; ++i) {
      const KvPages pages = pool_.layer(i);
      INFLLM_TRY(kv_append(backend, {.pages = pages,
                                     .batch = plan_.batch(),
                                     .k = keys,
                                     .v = keys,
                                     .k_score = layout.score_keys() ? keys : nullptr}));
      if (layout.pooled_keys) {
        INFLLM_TRY(compress(backend, {.pages = pages, .batch = plan_.batch()}));
      }
    }
    INFLLM_TRY(synchronize(backend));
    sequence_.advance(tokens, plan_.modes().front());
  }
  return {};
}

Result<double> BenchRunner::overlap() {
  constexpr std::int32_t kTokens = 512;
  const std::int32_t length = sequence_.cached;
  const std::int32_t tokens = std::min({kTokens, options_.chunk_tokens, length});
  INFLLM_TRY(start(length - tokens, tokens));
  const engine::Work work{&sequence_, tokens};
  INFLLM_TRY(plan_.build({&work, 1}, rule_, pool_));

  const Backend& backend = model_->backend();
  Buffer chosen, workspace;
  std::vector<std::int32_t> selection;
  double sum = 0;
  const model::AttentionObserver observer = [&](std::int32_t,
                                                const AttentionParams& params) -> Status {
    const std::int32_t columns = selection_columns(params);
    const std::int32_t heads = params.pages.layout.kv_heads;
    if (selection.empty()) {
      selection.resize(static_cast<std::size_t>(heads) * tokens * columns);
      chosen = INFLLM_TRY(allocate(backend, selection.size() * sizeof(selection[0])));
      workspace = INFLLM_TRY(allocate(backend, attention_workspace_bytes(backend, params)));
    }
    INFLLM_TRY(attention_selection(backend, params, chosen.as<std::int32_t>(),
                                   {workspace.data(), workspace.bytes()}));
    INFLLM_TRY(copy_out(backend, selection.data(), chosen.data(), chosen.bytes()));
    sum += neighbours_overlap(params.config, selection, heads, tokens, columns, length);
    return {};
  };
  INFLLM_TRY(runner_.run(plan_, nullptr, &observer));
  INFLLM_TRY(synchronize(backend));
  sequence_.advance(tokens, plan_.modes().front());
  return sum / model_->config().layers;
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
