// SPDX-License-Identifier: Apache-2.0
#include "infllm/model/layer.h"
#include "infllm/ops/kernels.h"
#include "infllm/ops/rope_append.h"

namespace infllm::model {
namespace {

// The long way, on columns that have no rope_append: rotate, cut, append.
//
// Rotates the heads of q and k inside the fused projection.
Status rotate(const Step& step) {
  const ModelConfig& c = step.config;
  const std::int64_t element = size_of(step.backend.kernels->activation);
  RopeParams params{.tokens = step.batch.num_tokens,
                    .heads = c.heads,
                    .head_dim = c.head_dim,
                    .row_stride = std::int64_t{c.heads + 2 * c.kv_heads} * c.head_dim,
                    .x = step.at(step.plan.qkv),
                    .cos = step.floats_at(step.plan.cos),
                    .sin = step.floats_at(step.plan.sin)};
  INFLLM_TRY(rope(step.backend, params));
  params.heads = c.kv_heads;
  params.x = step.at(step.plan.qkv + static_cast<std::size_t>(element * c.heads * c.head_dim));
  return rope(step.backend, params);
}

// Copies `heads` heads, from head `first` on, out of the fused projection.
Status cut(const Step& step, std::int32_t first, std::int32_t heads, std::size_t to) {
  const ModelConfig& c = step.config;
  return gather(step.backend, {.count = step.batch.num_tokens,
                               .width = std::int64_t{heads} * c.head_dim,
                               .row_stride = std::int64_t{c.heads + 2 * c.kv_heads} * c.head_dim,
                               .first_column = std::int64_t{first} * c.head_dim,
                               .x = step.at(step.plan.qkv),
                               .y = step.at(to)});
}

Status rotate_and_cut(const Step& step, bool keep_unrotated) {
  const ModelConfig& c = step.config;
  if (keep_unrotated) {
    INFLLM_TRY(cut(step, 0, c.heads, step.plan.q_score));
    INFLLM_TRY(cut(step, c.heads, c.kv_heads, step.plan.k_score));
  }
  INFLLM_TRY(rotate(step));
  INFLLM_TRY(cut(step, 0, c.heads, step.plan.q));
  INFLLM_TRY(cut(step, c.heads, c.kv_heads, step.plan.k));
  return cut(step, c.heads + c.kv_heads, c.kv_heads, step.plan.v);
}

}  // namespace

AttentionParams attention_params(const ModelConfig& config, const KvPages& pages,
                                 const Batch& batch) {
  return {.pages = pages,
          .batch = batch,
          .config = pages.layout.config,
          .heads_q = config.heads,
          .scale = config.attention_scale()};
}

Status attention_layer(const Step& step, const LayerWeights& weights, const KvPages& pages) {
  const ModelConfig& c = step.config;
  const Backend& backend = step.backend;
  const std::int64_t tokens = step.batch.num_tokens;
  const bool keep_unrotated = pages.layout.score_keys();
  bool pooled = false;

  INFLLM_TRY(normed_linear(step, weights.attention_norm,
                           {.weight = &weights.qkv,
                            .tokens = tokens,
                            .x = step.at(step.plan.hidden),
                            .y = step.at(step.plan.qkv)},
                           step.at(step.plan.normed), &ForwardTimes::projections));
  if (has_rope_append(backend)) {
    RopeAppendParams params{.pages = pages,
                            .batch = step.batch,
                            .heads_q = c.heads,
                            .qkv = step.at(step.plan.qkv),
                            .cos = step.floats_at(step.plan.cos),
                            .sin = step.floats_at(step.plan.sin),
                            .q = step.at(step.plan.q),
                            .q_score = keep_unrotated ? step.at(step.plan.q_score) : nullptr};
    params.pool = pooled = rope_append_pools(backend, params);
    INFLLM_TRY(timed(step, &ForwardTimes::rope, [&] { return rope_append(backend, params); }));
  } else {
    INFLLM_TRY(
        timed(step, &ForwardTimes::rope, [&] { return rotate_and_cut(step, keep_unrotated); }));
    INFLLM_TRY(timed(step, &ForwardTimes::cache, [&] {
      return kv_append(backend, {.pages = pages,
                                 .batch = step.batch,
                                 .k = step.at(step.plan.k),
                                 .v = step.at(step.plan.v),
                                 .k_score = keep_unrotated ? step.at(step.plan.k_score) : nullptr});
    }));
  }

  AttentionParams params = attention_params(c, pages, step.batch);
  params.q = step.at(step.plan.q);
  params.q_score = keep_unrotated ? step.at(step.plan.q_score) : nullptr;
  params.o = step.at(step.plan.qkv);  // its contents have been cut out
  params.pooled = pooled;
  params.times = step.times != nullptr ? &step.times->attention : nullptr;
  INFLLM_TRY(attention(backend, params, step.workspace));

  return timed(step, &ForwardTimes::projections, [&] {
    return linear(backend,
                  {.weight = &weights.o,
                   .tokens = tokens,
                   .x = params.o,
                   .y = step.at(step.plan.hidden),
                   .alpha = c.residual_scale(),
                   .accumulate = true},
                  step.workspace);
  });
}

}  // namespace infllm::model
