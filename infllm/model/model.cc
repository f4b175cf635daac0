// SPDX-License-Identifier: Apache-2.0
#include "infllm/model/model.h"

#include <fmt/format.h>

#include <algorithm>

#include "infllm/core/arena.h"
#include "infllm/model/layer.h"
#include "infllm/ops/kernels.h"

namespace infllm::model {
namespace {

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
  if (p.num_logits > 0 && p.logits == nullptr) {
    return invalid_argument("forward: logits is null, expected an array");
  }
  if (p.num_logits > 0 && p.logit_rows == nullptr && p.num_logits != p.batch.num_tokens) {
    return invalid_argument(fmt::format(
        "forward: logit_rows is null, which means each of {} tokens, but {} rows of logits are "
        "asked for",
        p.batch.num_tokens, p.num_logits));
  }
  return {};
}

// What comes before the first layer.
Status begin(const Step& step, RopeTableParams tables, const EmbeddingTable& table,
             const ForwardParams& p) {
  tables.tokens = p.batch.num_tokens;
  tables.positions = p.positions;
  tables.lengths = p.lengths;
  tables.cos = step.floats_at(step.plan.cos);
  tables.sin = step.floats_at(step.plan.sin);
  INFLLM_TRY(rope_tables(step.backend, tables));
  return embed(step.backend, {.table = &table,
                              .tokens = p.batch.num_tokens,
                              .token_ids = p.token_ids,
                              .scale = static_cast<float>(step.config.scale_emb),
                              .y = step.at(step.plan.hidden)});
}

// What the layer attended with.
AttentionParams observed(const Step& step, const KvPages& pages) {
  AttentionParams params = attention_params(step.config, pages, step.batch);
  params.q = step.at(step.plan.q);
  if (pages.layout.score_keys()) params.q_score = step.at(step.plan.q_score);
  return params;
}

// Logits of the picked rows: gather first, so that a long prompt normalises one row. A decoding
// step wants every row, as it is.
Status head(const Step& step, const Weights& weights, const ForwardParams& p) {
  const ModelConfig& c = step.config;
  void* picked = step.at(step.plan.picked);
  if (p.logit_rows != nullptr) {
    INFLLM_TRY(timed(step, &ForwardTimes::head, [&] {
      return gather(step.backend, {.count = p.num_logits,
                                   .width = c.hidden_size,
                                   .row_stride = c.hidden_size,
                                   .rows = p.logit_rows,
                                   .x = step.at(step.plan.hidden),
                                   .y = picked});
    }));
  }
  return normed_linear(step, weights.final_norm,
                       {.weight = &weights.head,
                        .tokens = p.num_logits,
                        .x = p.logit_rows != nullptr ? picked : step.at(step.plan.hidden),
                        .y = p.logits,
                        .alpha = c.logit_scale()},
                       picked, &ForwardTimes::head);
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
  const std::span<const float> numbers = model.rope_.numbers();
  model.rope_numbers_ = INFLLM_TRY(allocate(backend, numbers.size_bytes()));
  INFLLM_TRY(copy_in(backend, model.rope_numbers_.data(), numbers.data(), numbers.size_bytes()));
  return model;
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

  INFLLM_TRY(timed(step, &ForwardTimes::embed, [&] {
    return begin(step, rope_.tables(rope_numbers_.as<float>()), weights_.embedding, p);
  }));
  for (std::size_t i = 0; i < weights_.layers.size(); ++i) {
    INFLLM_TRY(attention_layer(step, weights_.layers[i], p.pages[i]));
    if (p.observer != nullptr) {
      INFLLM_TRY((*p.observer)(static_cast<std::int32_t>(i), observed(step, p.pages[i])));
    }
    INFLLM_TRY(mlp_layer(step, weights_.layers[i]));
  }
  if (p.num_logits == 0) return {};
  return head(step, weights_, p);
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
  // A backend may split a short step over more of the device than a long one, so the longest is not
  // always the one that wants most: every size of a decoding step is asked, and every power of two
  // of a longer one, as one sequence's and as many sequences'.
  std::size_t bytes = 0;
  const auto ask = [&](std::int32_t sequences, std::int32_t tokens) {
    Batch batch{.num_sequences = sequences,
                .num_tokens = tokens,
                .max_query_length = tokens - sequences + 1,
                .max_kv_length = limits.max_kv_length};
    batch.max_pages = static_cast<std::int32_t>(kv_layout().config.blocks_in(limits.max_kv_length));
    for (const bool sparse : {false, config_.sparse.has_value()}) {
      batch.any_sparse = sparse;
      bytes = std::max(bytes, workspace_bytes(batch, std::min(tokens, limits.max_logits)));
    }
  };
  for (std::int32_t i = 1; i <= limits.max_sequences; ++i) ask(i, i);
  for (std::int64_t tokens = 2; tokens < 2 * std::int64_t{limits.max_tokens}; tokens *= 2) {
    const auto count = static_cast<std::int32_t>(std::min<std::int64_t>(tokens, limits.max_tokens));
    ask(1, count);
    ask(std::min(limits.max_sequences, count), count);
  }
  return bytes;
}

std::size_t Model::logits_bytes(std::int32_t rows) const {
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(config_.vocab_size) *
         static_cast<std::size_t>(size_of(backend_.kernels->activation));
}

}  // namespace infllm::model
