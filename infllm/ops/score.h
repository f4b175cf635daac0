// SPDX-License-Identifier: Apache-2.0
//
// Step 2 of InfLLM-V2: one score per (KV head, token, block) (paper, equations 4 to 6; spec
// sections 3 and 4). For the token at position p and each query head h of the group of KV head g:
//
//   a_m  = scale q_h . KC2[m, g]          m visible to p;   M = max a_m,  Z = sum exp(a_m - M)
//   P_h[j] = exp(scale q_h . KC1[j, g] - M) / Z              j visible to p, else 0
//   S[j] = sum over the group's heads of P_h[j]
//   R[b] = max of S[j] over the windows j that overlap block b (first_window_of, clipped to those
//          visible to p); -inf where there is none
//
// With LseSource::kFine the normaliser M, Z comes from KC1 instead of KC2. Under
// ScoreRounding::kBF16 the result is rounded to bf16 (rounding is monotone, so rounding before or
// after the maximum is the same).
//
// Forced blocks (the first init_blocks and the last local_blocks() up to the token's own) get +inf,
// blocks after the own one -inf. A token whose causal blocks all fit in the budget needs no score:
// all its causal blocks get +inf. Rows of sequences that are not sparse are left unwritten.
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/kv_cache.h"

namespace infllm {

struct ScoreParams {
  KvPages pages;
  Batch batch;
  SparseConfig config;
  std::int32_t heads_q = 0;
  float scale = 0;          // head_dim ^ -1/2
  const void* q = nullptr;  // [T, Hq, D] activation type; before RoPE if config.use_nope
  void* scores = nullptr;   // [Hkv, T, N] accumulate type, N = blocks_in(batch.max_kv_length)
};

Status score(const Backend& backend, const ScoreParams& params, std::span<std::byte> workspace);
std::size_t score_workspace_bytes(const Backend& backend, const ScoreParams& params);

}  // namespace infllm
