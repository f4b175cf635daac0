// SPDX-License-Identifier: Apache-2.0
//
// What an engine will be, decided before anything is allocated: sizes, limits, bytes.
//
//   EngineShape shape = INFLLM_TRY(engine_shape(model, {.context = 32768}));
//   shape.memory.total();     // what Engine::create will allocate
#pragma once

#include <cstdint>
#include <optional>

#include "infllm/engine/plan.h"
#include "infllm/engine/sequence.h"
#include "infllm/model/model.h"

namespace infllm::engine {

struct EngineOptions {
  std::int32_t context = 0;  // prompt and answer of one sequence; 0: what the model is made for
  std::int32_t max_sequences = 1;  // that run at a time
  // That the cache holds of all sequences together; 0: max_sequences times the context. Less serves
  // sequences that begin the same or are short; who finds no room waits.
  std::int64_t cache_tokens = 0;
  std::int32_t chunk_tokens = 0;  // of prompts in one step; 0: default_chunk_tokens()
  std::optional<DType> kv_dtype;  // null: the model's choice
  bool dense = false;             // attend densely whatever the model's sparse_config says
  std::int64_t memory_limit = 0;  // bytes that the engine may allocate; 0: no limit
  bool measure = true;            // fill Timings' ForwardTimes, but not of recorded steps
};

struct EngineMemory {          // in bytes
  std::int64_t cache = 0;      // keys, values and pooled keys
  std::int64_t workspace = 0;  // activations, scores, selection
  std::int64_t logits = 0;
  std::int64_t plan = 0;
  std::int64_t total() const { return cache + workspace + logits + plan; }
};

struct EngineShape {
  EngineOptions options;  // with the defaults filled in
  KvLayout layout;        // of the cache
  std::int32_t pages = 0;
  ModeRule rule;
  model::StepLimits step_limits;
  PlanLimits plan_limits;
  EngineMemory memory;
};

// Enough to keep the device busy: 512 on a host, 8192 on a device.
std::int32_t default_chunk_tokens(const Backend& backend);

// What decides how this model's tokens are computed; `dense`: never sparsely.
ModeRule mode_rule(const model::ModelConfig& config, bool dense);

// kInvalidArgument for options that make no engine, kResourceExhausted for what does not fit in
// memory_limit, kUnsupported for a cache that the backend cannot hold.
Result<EngineShape> engine_shape(const model::Model& model, const EngineOptions& options);

}  // namespace infllm::engine
