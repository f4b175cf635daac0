// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>

#include "infllm/backend/cuda/page.cuh"
#include "infllm/ops/attend.h"

namespace infllm::cuda::sm90 {

// Whether Hopper's kernels cover a call whose groups of query heads may be `least` to `most` heads:
// powers of two; pages of 64 tokens, head dimension 64 or 128, bf16 or f16.
inline bool covers(const AttendParams& params, unsigned least, unsigned most) {
  const KvLayout& layout = params.pages.layout;
  if (layout.kv_heads < 1 || params.heads_q % layout.kv_heads != 0) return false;
  const auto group = static_cast<unsigned>(params.heads_q / layout.kv_heads);
  return std::has_single_bit(group) && group >= least && group <= most &&
         (layout.head_dim == 64 || layout.head_dim == 128) &&
         layout.config.block_size == kPageTokens &&
         (layout.dtype == DType::kBF16 || layout.dtype == DType::kF16);
}

}  // namespace infllm::cuda::sm90
