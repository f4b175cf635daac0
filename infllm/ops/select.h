// SPDX-License-Identifier: Apache-2.0
//
// Step 3 of InfLLM-V2: the best blocks of each (KV head, token) (paper, equation 7; spec section
// 5).
//
//   K = min(budget_blocks, N) columns; candidates are the blocks up to the token's own
//   the K largest R[b], ties to the lower index; sorted ascending; -1 in unused columns at the end
//
// Forced blocks come first whatever their score: the own block, then the local window from near to
// far, then the sink. This order matters only when the budget is smaller than the forced set.
// The local window is window_blocks blocks before the own block plus the own block (33 of 96 with
// the released numbers); under legacy_window it is window_blocks including the own block.
#pragma once

#include "infllm/ops/batch.h"
#include "infllm/ops/sparse_config.h"

namespace infllm {

struct Backend;

struct SelectParams {
  Batch batch;
  SparseConfig config;
  std::int32_t heads_kv = 0;
  const void* scores = nullptr;       // [Hkv, T, N] accumulate type, from score()
  std::int32_t* selection = nullptr;  // [Hkv, T, K]; rows of dense sequences are left unwritten

  std::int64_t blocks() const { return config.blocks_in(batch.max_kv_length); }  // N
  std::int32_t columns() const {                                                 // K
    return static_cast<std::int32_t>(std::min<std::int64_t>(config.budget_blocks(), blocks()));
  }
};

Status select(const Backend& backend, const SelectParams& params);

}  // namespace infllm
