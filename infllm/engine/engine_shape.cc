// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/engine_shape.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "infllm/engine/runner.h"
#include "infllm/ops/kernels.h"

namespace infllm::engine {
namespace {

Status check(const EngineOptions& options) {
  if (options.context >= 2 && options.max_sequences >= 1 && options.chunk_tokens >= 1) return {};
  return invalid_argument(fmt::format(
      "engine: a context of {} tokens, {} sequences and chunks of {} tokens; expected at "
      "least 2, 1 and 1",
      options.context, options.max_sequences, options.chunk_tokens));
}

}  // namespace

std::int32_t default_chunk_tokens(const Backend& backend) {
  return is_device(backend) ? 8192 : 512;
}

ModeRule mode_rule(const model::ModelConfig& config, bool dense) {
  ModeRule rule;
  if (!dense) rule.sparse = config.sparse;
  const model::RopeConfig& rope = config.rope;
  if (rope.type == model::RopeType::kLongRope && rope.short_factor != rope.long_factor) {
    rule.rope_switch = rope.original_max_positions;
  }
  return rule;
}

Result<EngineShape> engine_shape(const model::Model& model, const EngineOptions& options) {
  const Backend& backend = model.backend();
  EngineShape shape{.options = options};
  if (options.context == 0) shape.options.context = model.config().max_positions;
  if (options.chunk_tokens == 0) shape.options.chunk_tokens = default_chunk_tokens(backend);
  INFLLM_TRY(check(shape.options));
  const std::int32_t context = shape.options.context;
  const std::int32_t sequences = options.max_sequences;

  shape.layout = model.config().kv_layout(options.kv_dtype.value_or(model.kv_dtype()));
  if (options.dense) shape.layout.pooled_keys = false;
  INFLLM_TRY(infllm::check(backend, shape.layout));
  shape.rule = mode_rule(model.config(), options.dense);
  const std::int64_t pages_each = shape.layout.config.blocks_in(context);
  if (options.cache_tokens != 0 && options.cache_tokens < context) {
    return invalid_argument(fmt::format(
        "engine: a cache of {} tokens, expected at least a context's {}, or 0 for {} of them",
        options.cache_tokens, context, sequences));
  }
  const std::int64_t pages = options.cache_tokens != 0
                                 ? shape.layout.config.blocks_in(options.cache_tokens)
                                 : pages_each * sequences;
  if (pages > std::numeric_limits<std::int32_t>::max()) {
    return invalid_argument(fmt::format("engine: {} pages, more than can be numbered", pages));
  }
  shape.pages = static_cast<std::int32_t>(pages);
  // No prompt is longer than the context, so no step holds more of each.
  const std::int64_t chunk =
      std::min(std::int64_t{shape.options.chunk_tokens}, std::int64_t{context} * sequences);
  const auto max_tokens = static_cast<std::int32_t>(chunk + sequences);
  shape.step_limits = {.max_tokens = max_tokens,
                       .max_sequences = sequences,
                       .max_kv_length = context,
                       .max_logits = sequences};
  shape.plan_limits = {.max_tokens = max_tokens,
                       .max_sequences = sequences,
                       .max_pages = static_cast<std::int32_t>(pages_each),
                       .max_kv_length = context};

  EngineMemory& memory = shape.memory;
  memory.cache = KvPool::bytes(backend, shape.layout, model.config().layers, pages);
  memory.workspace = static_cast<std::int64_t>(model.workspace_bytes(shape.step_limits));
  memory.logits = Runner::logits_bytes(model, sequences);
  memory.plan = Plan::bytes(shape.plan_limits);
  if (options.memory_limit > 0 && memory.total() > options.memory_limit) {
    constexpr double kGigabyte = 1e9;
    return resource_exhausted(fmt::format(
        "a context of {} tokens x {} sequences needs {:.2f} GB ({:.2f} cache, {:.2f} workspace) "
        "besides the weights; {:.2f} GB are available on {}; lower --ctx-size",
        context, sequences, static_cast<double>(memory.total()) / kGigabyte,
        static_cast<double>(memory.cache) / kGigabyte,
        static_cast<double>(memory.workspace) / kGigabyte,
        static_cast<double>(options.memory_limit) / kGigabyte, backend.name));
  }
  return shape;
}

}  // namespace infllm::engine
