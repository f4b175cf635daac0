// SPDX-License-Identifier: Apache-2.0
//
// What follows from a ModelConfig: derived numbers, overrides, and the built-in shapes.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cmath>

#include "infllm/model/config.h"

namespace infllm::model {
namespace {

struct NamedConfig {
  std::string_view name;
  ModelConfig config;
};

const std::vector<NamedConfig>& catalogue() {
  const ModelConfig minicpm4_8b{.hidden_size = 4096,
                                .layers = 32,
                                .heads = 32,
                                .kv_heads = 2,
                                .head_dim = 128,
                                .intermediate_size = 16384,
                                .vocab_size = 73448,
                                .max_positions = 32768,
                                .scale_emb = 12,
                                .scale_depth = 1.4,
                                .dim_model_base = 256,
                                .sparse = SparseConfig{},
                                .bos_token = 1,
                                .eos_tokens = {2, 73440}};
  static const std::vector<NamedConfig> all = [&] {
    ModelConfig minicpm41_8b = minicpm4_8b;
    minicpm41_8b.max_positions = 65536;

    ModelConfig minicpm4_half_b = minicpm4_8b;
    minicpm4_half_b.hidden_size = 1024;
    minicpm4_half_b.layers = 24;
    minicpm4_half_b.heads = 16;
    minicpm4_half_b.head_dim = 64;
    minicpm4_half_b.intermediate_size = 4096;
    minicpm4_half_b.tied_embeddings = true;
    minicpm4_half_b.sparse.reset();

    ModelConfig bitcpm4_1b = minicpm4_half_b;
    bitcpm4_1b.hidden_size = 1536;
    bitcpm4_1b.layers = 52;
    bitcpm4_1b.heads = 24;
    bitcpm4_1b.kv_heads = 8;
    bitcpm4_1b.intermediate_size = 3840;
    bitcpm4_1b.rms_norm_eps = 1e-5f;

    return std::vector<NamedConfig>{{"minicpm4-0.5b", minicpm4_half_b},
                                    {"minicpm4-8b", minicpm4_8b},
                                    {"minicpm4.1-8b", minicpm41_8b},
                                    {"bitcpm4-1b", bitcpm4_1b}};
  }();
  return all;
}

template <typename Value>
bool set(const std::optional<Value>& from, Value& to) {
  if (from) to = *from;
  return from.has_value();
}

}  // namespace

std::string_view name_of(Architecture architecture) {
  return architecture == Architecture::kMiniCpm4 ? "minicpm4" : "llama";
}

float ModelConfig::attention_scale() const {
  return static_cast<float>(1 / std::sqrt(static_cast<double>(head_dim)));
}

float ModelConfig::residual_scale() const {
  return static_cast<float>(scale_depth / std::sqrt(static_cast<double>(layers)));
}

float ModelConfig::logit_scale() const { return static_cast<float>(dim_model_base / hidden_size); }

std::int64_t ModelConfig::parameters() const {
  const std::int64_t hidden = hidden_size;
  const std::int64_t projections = hidden * head_dim * (2 * heads + 2 * kv_heads);
  const std::int64_t layer = projections + 3 * hidden * intermediate_size + 2 * hidden;
  const std::int64_t table = hidden * vocab_size;
  return layers * layer + hidden + table * (tied_embeddings ? 1 : 2);
}

KvLayout ModelConfig::kv_layout(DType kv_dtype) const {
  return {.dtype = kv_dtype,
          .kv_heads = kv_heads,
          .head_dim = head_dim,
          .pooled_keys = sparse.has_value(),
          .config = sparse.value_or(SparseConfig{})};
}

Status apply_overrides(ModelConfig& config, const Overrides& overrides) {
  SparseConfig sparse = config.sparse.value_or(SparseConfig{});
  bool wants_sparse = overrides.sparse.value_or(config.sparse.has_value());
  bool any = set(overrides.kernel_size, sparse.kernel_size);
  any |= set(overrides.kernel_stride, sparse.kernel_stride);
  any |= set(overrides.init_blocks, sparse.init_blocks);
  any |= set(overrides.block_size, sparse.block_size);
  any |= set(overrides.window_size, sparse.window_size);
  any |= set(overrides.topk, sparse.topk);
  any |= set(overrides.dense_len, sparse.dense_len);
  any |= set(overrides.use_nope, sparse.use_nope);
  any |= set(overrides.legacy_window, sparse.legacy_window);
  any |= set(overrides.lse_source, sparse.lse_source);
  any |= set(overrides.score_rounding, sparse.score_rounding);
  if (any && overrides.sparse == false) {
    return invalid_argument(
        "sparse attention is switched off and configured at once; drop one of the two");
  }
  wants_sparse |= any;
  INFLLM_TRY(check(sparse));
  config.sparse = wants_sparse ? std::optional<SparseConfig>(sparse) : std::nullopt;
  return {};
}

Result<ModelConfig> named_config(std::string_view name) {
  for (const NamedConfig& named : catalogue()) {
    if (named.name == name) return named.config;
  }
  return not_found(fmt::format("no built-in shape \"{:.64}\"; choose one of: {}", name,
                               fmt::join(named_configs(), ", ")));
}

std::vector<std::string> named_configs() {
  std::vector<std::string> names;
  for (const NamedConfig& named : catalogue()) names.emplace_back(named.name);
  return names;
}

}  // namespace infllm::model
