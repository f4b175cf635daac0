// SPDX-License-Identifier: Apache-2.0
//
// Step 1 of InfLLM-V2: mean-pooled keys, without parameters (paper, equation 3; spec section 2).
//
//   KC1[j] = mean(K[stride j .. stride j + size - 1]),  size 32, stride 16: scores the blocks
//   KC2[m] = mean(K[4 stride m .. 4 stride m + 4 size - 1]):                normalises the scores
//
// Only complete windows exist. Sums are taken in the accumulate type over the cached (rounded) keys
// and rounded once; KC2 is pooled from the keys, not from KC1.
//
// A step that takes a sequence from from_length to kv_length keys emits every window whose last
// token lies in that range. Prefill, chunked prefill, decoding and a late start (from_length 0) are
// one code path.
#pragma once

#include "infllm/ops/kv_cache.h"

namespace infllm {

struct CompressParams {
  KvPages pages;
  Batch batch;
  // [B] keys whose windows are pooled already; null: kv_length minus the step's tokens.
  const std::int32_t* from_length = nullptr;
};

Status compress(const Backend& backend, const CompressParams& params);

}  // namespace infllm
