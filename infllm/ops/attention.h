// SPDX-License-Identifier: Apache-2.0
//
// InfLLM-V2 as one operation: dense on short inputs, sparse on long ones, same weights.
// attention.cc is the paper on one page.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "infllm/ops/kv_cache.h"

namespace infllm {

// Where the time of attention() went, in seconds; added to, never reset. Measuring waits for each
// step to finish, so a device backend pays for it. A column that scores and selects in one step has
// the time of both under score.
struct StepTimes {
  double compress = 0;
  double score = 0;
  double select = 0;
  double attend = 0;
};

struct AttentionParams {
  KvPages pages;  // the step's keys and values are appended already
  Batch batch;
  SparseConfig config;
  std::int32_t heads_q = 0;
  float scale = 0;                // head_dim ^ -1/2
  const void* q = nullptr;        // [T, Hq, D] activation type, after RoPE
  const void* q_score = nullptr;  // [T, Hq, D] before RoPE, when config.use_nope
  void* o = nullptr;              // [T, Hq, D] activation type
  void* lse = nullptr;            // [Hq, T] accumulate type; may be null
  // The call just before was rope_append() with `pool`, so this step's keys are pooled already; and
  // all else that the pages hold was there before the batch was copied in.
  bool pooled = false;
  StepTimes* times = nullptr;  // may be null
};

Status attention(const Backend& backend, const AttentionParams& params,
                 std::span<std::byte> workspace);
std::size_t attention_workspace_bytes(const Backend& backend, const AttentionParams& params);

// The blocks that attention() chooses, without attending to them: [Hkv, T, columns] as select()
// leaves them. The same workspace suffices.
Status attention_selection(const Backend& backend, const AttentionParams& params,
                           std::int32_t* selection, std::span<std::byte> workspace);
std::int32_t selection_columns(const AttentionParams& params);

}  // namespace infllm
