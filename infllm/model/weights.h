// SPDX-License-Identifier: Apache-2.0
//
// A checkpoint's tensors as a backend's packed weights.
//
//   auto source = INFLLM_TRY(open_checkpoint(folder));
//   Weights weights = INFLLM_TRY(load_weights(backend, config, *source, {.on_progress = bar}));
//
// All names and shapes are checked against the config before anything is allocated; a tensor that
// is missing, misshapen or not part of the model is named.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "infllm/core/status.h"
#include "infllm/model/config.h"
#include "infllm/model/weight_source.h"
#include "infllm/ops/transformer.h"

namespace infllm::model {

struct LayerWeights {
  Buffer attention_norm;  // [H] accumulate type
  LinearWeight qkv;       // [(Hq + 2 Hkv) D, H]: q, then k, then v
  LinearWeight o;         // [H, Hq D]
  Buffer mlp_norm;        // [H]
  LinearWeight gate_up;   // [2 I, H]: gate, then up
  LinearWeight down;      // [H, I]
};

struct Weights {
  EmbeddingTable embedding;  // [V, H]
  std::vector<LayerWeights> layers;
  Buffer final_norm;                            // [H]
  LinearWeight head;                            // [V, H], packed from the table when tied
  WeightFormat format = WeightFormat::kBF16;    // of every matrix but the embedding
  std::shared_ptr<const void> embedding_owner;  // a host backend reads the table in place

  std::int64_t bytes() const;         // of all packed memory and the table
  std::int64_t decode_bytes() const;  // what one token reads: all but the table
};

struct LoadOptions {
  std::optional<WeightFormat> format;  // null: default_format()
  std::int32_t int8_group_size = 0;    // of kI8: inputs that share a scale; 0: the whole row
  // Called after every tensor, from the calling thread; counts bytes of the source.
  std::function<void(std::int64_t done, std::int64_t total)> on_progress;
  // Asked between tensors; true ends the load with kCancelled.
  std::function<bool()> cancelled;
};

// The checkpoint's own: f32 for float32 (and float64) files where the backend computes in as much,
// bf16 otherwise.
WeightFormat default_format(const Backend& backend, bool is_wide);
// What a cache is kept in unless told otherwise: the backend's activation type for float32 weights,
// which loses nothing, and where activations have 16 bits themselves; bf16 otherwise.
DType default_kv_dtype(const Backend& backend, WeightFormat format);

Result<Weights> load_weights(const Backend& backend, const ModelConfig& config,
                             const WeightSource& source, const LoadOptions& options = {});

// --dtype: "auto" (null), "float32", "bfloat16", "int8"; f32, bf16 and i8 are accepted too.
Result<std::optional<WeightFormat>> parse_weight_format(std::string_view name);

}  // namespace infllm::model
