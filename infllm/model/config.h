// SPDX-License-Identifier: Apache-2.0
//
// config.json of a Hugging Face checkpoint as a plain struct.
//
//   ModelConfig config = INFLLM_TRY(read_config("MiniCPM4.1-8B"));
//   INFLLM_TRY(apply_overrides(config, {.topk = 32, .dense_len = -1}));
//
// Read: model_type minicpm, minicpm4 and llama, or, where it is missing, the first of
// `architectures` (MiniCPMForCausalLM, MiniCPM4ForCausalLM, LlamaForCausalLM). Fields that we do
// not know are ignored; fields that would change the result and that we do not implement (biases,
// other activations, quantization, remote rope types) are refused by name. Every number has a
// range, and a message says which field, what was found and what was expected.
//
// Nulls and absences follow the config classes of the checkpoints:
//   num_key_value_heads   num_attention_heads       head_dim       hidden_size / heads
//   scale_depth           sqrt(layers) (factor 1)   dim_model_base hidden_size (factor 1)
//   scale_emb 12, scale_depth 1.4, dim_model_base 256, tie_word_embeddings true  if absent, minicpm
//   tie_word_embeddings false if absent, llama; llama has none of the three scalings
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "infllm/core/dtype.h"
#include "infllm/core/status.h"
#include "infllm/model/rope.h"
#include "infllm/ops/kv_cache.h"
#include "infllm/ops/sparse_config.h"

namespace infllm::model {

enum class Architecture : std::uint8_t { kMiniCpm4, kLlama };
std::string_view name_of(Architecture architecture);

struct ModelConfig {
  Architecture architecture = Architecture::kMiniCpm4;
  std::int32_t hidden_size = 0;        // H
  std::int32_t layers = 0;             // num_hidden_layers
  std::int32_t heads = 0;              // Hq, num_attention_heads
  std::int32_t kv_heads = 0;           // Hkv, num_key_value_heads
  std::int32_t head_dim = 0;           // D
  std::int32_t intermediate_size = 0;  // I
  std::int32_t vocab_size = 0;         // V
  std::int32_t max_positions = 0;      // max_position_embeddings: what the model was trained for
  float rms_norm_eps = 1e-6f;
  RopeConfig rope;

  // Maximal update parametrisation: h = scale_emb E, h += scale_depth / sqrt(layers) f(h),
  // logits = W h dim_model_base / hidden_size. All three factors are 1 for llama.
  double scale_emb = 1;
  double scale_depth = 1;
  double dim_model_base = 0;

  bool tied_embeddings = false;        // the head is the embedding table
  std::optional<SparseConfig> sparse;  // none: the model always attends densely
  DType dtype = DType::kBF16;          // torch_dtype: what the checkpoint was trained in
  std::int32_t bos_token = -1;         // -1: none
  std::vector<std::int32_t> eos_tokens;

  std::int32_t group() const { return heads / kv_heads; }
  float attention_scale() const;  // head_dim ^ -1/2
  float residual_scale() const;   // scale_depth / sqrt(layers); 1 for llama
  float logit_scale() const;      // dim_model_base / hidden_size; 1 for llama
  std::int64_t parameters() const;

  // The cache of one layer. Without sparse config: no pooled keys, pages of 64 tokens.
  KvLayout kv_layout(DType dtype) const;
};

// The text of a config.json, or the one in a checkpoint folder.
Result<ModelConfig> parse_config(std::string_view json);
Result<ModelConfig> read_config(const std::filesystem::path& folder);

// What the user changes on the command line; null leaves the checkpoint's value. A checkpoint
// without sparse_config gets the released numbers as soon as one sparse field is set.
struct Overrides {
  // false: drop sparse_config. true: the released numbers, if the checkpoint has none.
  std::optional<bool> sparse;
  std::optional<std::int32_t> kernel_size, kernel_stride, init_blocks, block_size, window_size;
  std::optional<std::int32_t> topk, dense_len;
  std::optional<bool> use_nope, legacy_window;
  std::optional<LseSource> lse_source;
  std::optional<ScoreRounding> score_rounding;
};
Status apply_overrides(ModelConfig& config, const Overrides& overrides);

// True shapes for generated weights: "minicpm4-0.5b", "minicpm4-8b", "minicpm4.1-8b", "bitcpm4-1b".
// The 8B shapes come with the released sparse_config, the small ones without, like the models that
// users run. Plain RoPE: LongRoPE's factors are a checkpoint's data, and cost nothing.
Result<ModelConfig> named_config(std::string_view name);
std::vector<std::string> named_configs();

}  // namespace infllm::model
