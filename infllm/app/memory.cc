// SPDX-License-Identifier: Apache-2.0
#include "infllm/app/memory.h"

#include <algorithm>

#include "infllm/model/layer.h"
#include "infllm/ops/kernels.h"

namespace infllm::app {
namespace {

std::int64_t element_bytes(WeightFormat format) {
  switch (format) {
    case WeightFormat::kF64:
      return 8;
    case WeightFormat::kF32:
      return 4;
    case WeightFormat::kBF16:
      return 2;
    case WeightFormat::kI8:
      return 1;
  }
  return 0;
}

std::size_t workspace_bytes(const Backend& backend, const model::ModelConfig& config,
                            const KvLayout& layout, WeightFormat format, std::int32_t tokens,
                            std::int32_t step_tokens) {
  const Batch batch{.num_sequences = 1,
                    .num_tokens = step_tokens,
                    .max_pages = static_cast<std::int32_t>(layout.config.blocks_in(tokens)),
                    .any_sparse = config.sparse && config.sparse->is_sparse_at(tokens),
                    .max_query_length = step_tokens,
                    .max_kv_length = tokens};
  const auto linear_bytes = [&](std::int64_t outputs, std::int64_t inputs) {
    const LinearWeight shape{.outputs = outputs, .inputs = inputs, .format = format};
    return linear_workspace_bytes(backend, {.weight = &shape, .tokens = step_tokens});
  };
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t q_width = std::int64_t{config.heads} * config.head_dim;
  const std::int64_t kv_width = std::int64_t{config.kv_heads} * config.head_dim;
  const KvPages pages{.layout = layout};
  return model::plan_activations(config, size_of(backend.kernels->activation), step_tokens, 1)
             .bytes +
         std::max(
             {linear_bytes(q_width + 2 * kv_width, hidden), linear_bytes(hidden, q_width),
              linear_bytes(2 * std::int64_t{config.intermediate_size}, hidden),
              linear_bytes(hidden, config.intermediate_size),
              attention_workspace_bytes(backend, model::attention_params(config, pages, batch))});
}

}  // namespace

std::int64_t weight_bytes(const model::ModelConfig& config, WeightFormat format) {
  const std::int64_t table = std::int64_t{config.vocab_size} * config.hidden_size;
  const std::int64_t matrices = config.parameters() - (config.tied_embeddings ? 0 : table);
  return matrices * element_bytes(format) + table * size_of(config.dtype);
}

MemoryNeed memory_need(const Backend& backend, const model::ModelConfig& config,
                       WeightFormat format, DType kv_dtype, std::int32_t tokens,
                       std::int32_t chunk_tokens) {
  const KvLayout layout = config.kv_layout(kv_dtype);
  KvLayout without_pooled = layout;
  without_pooled.pooled_keys = false;
  const std::int64_t pages = layout.config.blocks_in(tokens) * config.layers;
  MemoryNeed need;
  need.weights = weight_bytes(config, format);
  need.keys_values = kv_page_bytes(backend, without_pooled) * pages;
  need.pooled_keys = kv_page_bytes(backend, layout) * pages - need.keys_values;
  need.workspace = static_cast<std::int64_t>(
      workspace_bytes(backend, config, layout, format, tokens, std::min(tokens, chunk_tokens)));
  return need;
}

}  // namespace infllm::app
