// SPDX-License-Identifier: Apache-2.0
//
// What a model will take, computed from its config alone: nothing is loaded.
#pragma once

#include <cstdint>

#include "infllm/app/options.h"
#include "infllm/model/config.h"
#include "infllm/ops/backend.h"
#include "infllm/ops/transformer.h"

namespace infllm::app {

struct MemoryNeed {
  std::int64_t weights = 0;
  std::int64_t keys_values = 0;
  std::int64_t pooled_keys = 0;
  std::int64_t workspace = 0;
  std::int64_t total() const { return weights + keys_values + pooled_keys + workspace; }
};

// Matrices in the weight format (a tied head is packed from the table once more) and the embedding
// table as it is in the file.
std::int64_t weight_bytes(const model::ModelConfig& config, WeightFormat format);

// Of one sequence of `tokens` tokens with weights in `format`, prefilled `chunk_tokens` at a time.
MemoryNeed memory_need(const Backend& backend, const model::ModelConfig& config,
                       WeightFormat format, DType kv_dtype, std::int32_t tokens,
                       std::int32_t chunk_tokens);

}  // namespace infllm::app
