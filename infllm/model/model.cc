// SPDX-License-Identifier: Apache-2.0
#include "infllm/model/model.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "infllm/core/arena.h"
#include "infllm/model/layer.h"
#include "infllm/ops/kernels.h"

namespace infllm::model {
namespace {

// Floats of rotary tables that are computed at a time, before they go to the backend's memory.
constexpr std::size_t kRopeTile = 4096;

Status check_forward(const ForwardParams& p, const ModelConfig& config) {
  INFLLM_TRY(check(p.batch));
  if (p.pages.size() != static_cast<std::size_t>(config.layers)) {
    return invalid_argument(
        fmt::format("forward: caches of {} layers, expected {}", p.pages.size(), config.layers));
  }
  if (p.batch.any_sparse && !config.sparse) {
    return invalid_argument(
        "forward: a sparse sequence, but the model has no sparse_config; override it on load");
  }
  if (p.num_logits < 0 || p.num_logits > p.batch.num_tokens) {
    return invalid_argument(
        fmt::format("forward: {} rows of logits for {} tokens", p.num_logits, p.batch.num_tokens));
  }
  if (p.batch.num_tokens > 0 && (p.token_ids == nullptr || p.positions == nullptr)) {
    return invalid_argument("forward: token_ids or positions is null, expected arrays");
  }
  if (p.num_logits > 0 && (p.logit_rows == nullptr || p.logits == nullptr)) {
    return invalid_argument("forward: logit_rows or logits is null, expected arrays");
  }
  return {};
}

// The step's tables of cos and sin, tile by tile: computed here, once for all layers, and copied.
Status fill_rope_tables(const Step& step, const Rope& rope, const ForwardParams& p) {
  const std::int64_t half = step.config.head_dim / 2;
  const std::int64_t tile_tokens = static_cast<std::int64_t>(kRopeTile) / half;
  std::array<float, kRopeTile> cos;
  std::array<float, kRopeTile> sin;
  for (std::int64_t first = 0; first < p.batch.num_tokens; first += tile_tokens) {
    const std::int64_t count = std::min<std::int64_t>(tile_tokens, p.batch.num_tokens - first);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int32_t position = p.positions[first + i];
      const std::int32_t length = p.lengths != nullptr ? p.lengths[first + i] : position + 1;
      rope.row(position, length, cos.data() + i * half, sin.data() + i * half);
    }
    const auto offset = static_cast<std::size_t>(first * half) * sizeof(float);
    const auto bytes = static_cast<std::size_t>(count * half) * sizeof(float);
    INFLLM_TRY(copy_in(step.backend, step.at(step.plan.cos + offset), cos.data(), bytes));
    INFLLM_TRY(copy_in(step.backend, step.at(step.plan.sin + offset), sin.data(), bytes));
  }
  return {};
}

// What comes before the first layer.
Status begin(const Step& step, const Rope& rope, const EmbeddingTable& table,
             const ForwardParams& p) {
  INFLLM_TRY(fill_rope_tables(step, rope, p));
  return embed(step.backend, {.table = &table,
                              .tokens = p.batch.num_tokens,
                              .token_ids = p.token_ids,
                              .scale = static_cast<float>(step.config.scale_emb),
                              .y = step.at(step.plan.hidden)});
}

// Logits of the picked rows: gather first, so that a long prompt normalises one row.
Status head(const Step& step, const Weights& weights, const ForwardParams& p) {
  const ModelConfig& c = step.config;
  void* picked = step.at(step.plan.picked);
  INFLLM_TRY(gather(step.backend, {.count = p.num_logits,
                                   .width = c.hidden_size,
                                   .row_stride = c.hidden_size,
                                   .rows = p.logit_rows,
                                   .x = step.at(step.plan.hidden),
                                   .y = picked}));
  INFLLM_TRY(rms_norm(step.backend, {.tokens = p.num_logits,
                                     .width = c.hidden_size,
                                     .x = picked,
                                     .weight = weights.final_norm.data(),
                                     .epsilon = c.rms_norm_eps,
                                     .y = picked}));
  return linear(step.backend,
                {.weight = &weights.head,
                 .tokens = p.num_logits,
                 .x = picked,
                 .y = p.logits,
                 .alpha = c.logit_scale()},
                step.workspace);
}

}  // namespace

ActivationPlan plan_activations(const ModelConfig& c, std::int64_t activation_bytes,
                                std::int64_t tokens, std::int64_t num_logits) {
  std::size_t used = 0;
  const auto take = [&used](std::int64_t rows, std::int64_t width, std::int64_t element) {
    const std::size_t offset = used;
    used += align_up(static_cast<std::size_t>(rows * width * element));
    return offset;
  };
  const std::int64_t q_width = std::int64_t{c.heads} * c.head_dim;
  const std::int64_t kv_width = std::int64_t{c.kv_heads} * c.head_dim;
  const bool keep_unrotated = c.sparse && c.sparse->use_nope;

  ActivationPlan plan;
  plan.hidden = take(tokens, c.hidden_size, activation_bytes);
  plan.cos = take(tokens, c.head_dim / 2, sizeof(float));
  plan.sin = take(tokens, c.head_dim / 2, sizeof(float));
  const std::size_t shared = used;
  plan.picked = take(num_logits, c.hidden_size, activation_bytes);
  const std::size_t end_of_head = used;

  used = shared;
  plan.normed = take(tokens, c.hidden_size, activation_bytes);
  const std::size_t halves = used;
  plan.gate_up = take(tokens, 2 * std::int64_t{c.intermediate_size}, activation_bytes);
  plan.gated = take(tokens, c.intermediate_size, activation_bytes);
  const std::size_t end_of_mlp = used;

  used = halves;
  plan.qkv = take(tokens, q_width + 2 * kv_width, activation_bytes);
  plan.q = take(tokens, q_width, activation_bytes);
  plan.k = take(tokens, kv_width, activation_bytes);
  plan.v = take(tokens, kv_width, activation_bytes);
  plan.q_score = take(keep_unrotated ? tokens : 0, q_width, activation_bytes);
  plan.k_score = take(keep_unrotated ? tokens : 0, kv_width, activation_bytes);
  plan.bytes = std::max({used, end_of_mlp, end_of_head});
  return plan;
}

double ForwardTimes::total() const {
  return attention.compress + attention.score + attention.select + attention.attend + embed + norm +
         projections + rope + cache + mlp + head;
}

Model::Model(Backend backend, ModelConfig config, Weights weights)
    : backend_(std::move(backend)),
      config_(std::move(config)),
      weights_(std::move(weights)),
      rope_(config_.rope, config_.head_dim, config_.max_positions) {}

Result<Model> Model::load(const Backend& backend, const ModelConfig& config,
                          const WeightSource& source, const LoadOptions& options) {
  Weights weights = INFLLM_TRY(load_weights(backend, config, source, options));
  Model model(backend, config, std::move(weights));
  INFLLM_TRY(check(backend, model.kv_layout()));
  return model;
}

DType Model::kv_dtype() const {
  return weights_.format == WeightFormat::kF32 ? backend_.kernels->activation : DType::kBF16;
}

Status Model::forward(const ForwardParams& p) const {
  INFLLM_TRY(check_forward(p, config_));
  if (p.batch.num_tokens == 0) return {};
  const std::size_t needed = workspace_bytes(p.batch, p.num_logits);
  if (p.workspace.size() < needed) {
    return invalid_argument(
        fmt::format("forward: the workspace has {} bytes, expected {}; ask workspace_bytes()",
                    p.workspace.size(), needed));
  }
  Step step{.backend = backend_, .config = config_, .batch = p.batch, .times = p.times};
  step.plan = plan_activations(config_, size_of(backend_.kernels->activation), p.batch.num_tokens,
                               p.num_logits);
  Arena arena(p.workspace);
  step.activations = arena.take<std::byte>(static_cast<std::int64_t>(step.plan.bytes));
  step.workspace = arena.rest();

  INFLLM_TRY(timed(p.times, &ForwardTimes::embed,
                   [&] { return begin(step, rope_, weights_.embedding, p); }));
  for (std::size_t i = 0; i < weights_.layers.size(); ++i) {
    INFLLM_TRY(attention_layer(step, weights_.layers[i], p.pages[i]));
    INFLLM_TRY(mlp_layer(step, weights_.layers[i]));
  }
  if (p.num_logits == 0) return {};
  return timed(p.times, &ForwardTimes::head, [&] { return head(step, weights_, p); });
}

std::size_t Model::workspace_bytes(const Batch& batch, std::int32_t num_logits) const {
  const auto linear_bytes = [&](const LinearWeight& weight, std::int64_t tokens) {
    return linear_workspace_bytes(backend_, {.weight = &weight, .tokens = tokens});
  };
  const LayerWeights& layer = weights_.layers.front();  // all have the same shapes
  const KvPages pages{.layout = kv_layout()};
  const std::size_t operations =
      std::max({linear_bytes(layer.qkv, batch.num_tokens), linear_bytes(layer.o, batch.num_tokens),
                linear_bytes(layer.gate_up, batch.num_tokens),
                linear_bytes(layer.down, batch.num_tokens), linear_bytes(weights_.head, num_logits),
                attention_workspace_bytes(backend_, attention_params(config_, pages, batch))});
  ArenaSize size;
  size.add(
      plan_activations(config_, size_of(backend_.kernels->activation), batch.num_tokens, num_logits)
          .bytes);
  size.add(operations);
  return size.bytes();
}

std::size_t Model::workspace_bytes(const StepLimits& limits) const {
  // A backend may want more for many short sequences than for one long chunk, or the other way
  // round: both ends are asked.
  std::size_t bytes = 0;
  for (const bool decode : {false, true}) {
    Batch batch{.num_sequences = limits.max_sequences,
                .num_tokens = decode ? limits.max_sequences : limits.max_tokens,
                .max_query_length = decode ? 1 : limits.max_tokens,
                .max_kv_length = limits.max_kv_length};
    batch.max_pages = static_cast<std::int32_t>(kv_layout().config.blocks_in(limits.max_kv_length));
    bytes = std::max(bytes, workspace_bytes(batch, limits.max_logits));
    if (config_.sparse) {
      batch.any_sparse = true;
      bytes = std::max(bytes, workspace_bytes(batch, limits.max_logits));
    }
  }
  return bytes;
}

std::size_t Model::logits_bytes(std::int32_t rows) const {
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(config_.vocab_size) *
         static_cast<std::size_t>(size_of(backend_.kernels->activation));
}

}  // namespace infllm::model
