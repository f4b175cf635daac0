// SPDX-License-Identifier: Apache-2.0
//
// A layer's fused projection taken apart in one pass: what rope(), gather() and kv_append() do one
// after the other, in one reading of it and one launch.
//
//   q[t, h]      = rotated query         q_score[t, h] = the query as it was (use_nope)
//   pages, at the token's position: rotated keys, values, and (use_nope) keys as they were
//
// Rotation and rounding are rope()'s. A column may lack this step; its caller takes the long way.
//
// Where rope_append_pools(), `pool` has the windows that the step's keys complete pooled too: the
// numbers that compress() would leave, and one launch less for a step that seldom completes any.
#pragma once

#include "infllm/ops/kv_cache.h"

namespace infllm {

struct RopeAppendParams {
  KvPages pages;
  Batch batch;
  std::int32_t heads_q = 0;
  const void* qkv = nullptr;   // [T, (Hq + 2 Hkv) D] activation type: queries, keys, values
  const float* cos = nullptr;  // [T, D / 2]
  const float* sin = nullptr;  // [T, D / 2]
  void* q = nullptr;           // [T, Hq, D]
  void* q_score = nullptr;     // [T, Hq, D], when layout.score_keys()
  bool pool = false;           // and do what compress() would
};

bool has_rope_append(const Backend& backend);
bool rope_append_pools(const Backend& backend, const RopeAppendParams& params);
Status rope_append(const Backend& backend, const RopeAppendParams& params);

}  // namespace infllm
