// SPDX-License-Identifier: Apache-2.0
//
// Step 4 of InfLLM-V2, and dense attention, which is the same with every block selected (paper,
// equation 8; spec section 7). For the token at position p, KV head g and each head h of its group:
//
//   Vis = the selected blocks of (g, token), or all blocks, cut to positions <= p
//   x_t = scale q_h . K[t, g]  for t in Vis;   LSE_h = log sum exp x_t
//   O_h = sum exp(x_t - LSE_h) V[t, g]
//
// A row that sees nothing (an empty sequence) gives O = 0 and LSE = -inf.
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/kv_cache.h"

namespace infllm {

struct AttendParams {
  KvPages pages;
  Batch batch;
  std::int32_t heads_q = 0;
  float scale = 0;
  const void* q = nullptr;  // [T, Hq, D] activation type
  void* o = nullptr;        // [T, Hq, D] activation type
  void* lse = nullptr;      // [Hq, T] accumulate type, natural logarithm; may be null
  // Null: every block. Otherwise [Hkv, T, columns], ascending, unique, -1 padded at the end;
  // sequences with batch.sparse[b] == 0 attend densely all the same.
  const std::int32_t* selection = nullptr;
  std::int32_t columns = 0;
  // The config of score_select() if that call on the same batch wrote the selection and was the one
  // just before this: a device may then start on the forced blocks before it has ended. Else null.
  const SparseConfig* follows_select = nullptr;
};

Status attend(const Backend& backend, const AttendParams& params, std::span<std::byte> workspace);
std::size_t attend_workspace_bytes(const Backend& backend, const AttendParams& params);

// Gradients with the selection held constant (spec section 8). With P = exp(x - LSE),
// Delta_h = sum dO O, dS = P (dO V - Delta + dLSE):
//   dQ_h = scale sum_t dS K_t    dK_t = scale sum dS q_h    dV_t = sum P dO_h
//
// dLSE is what merging partial results and context parallelism send back. A learned bias of each
// key and KV head within the soft-max (NOSA: x_t + bias[t, g], natural units) has its place here: a
// plane of the cache's pages on the way there, and on the way back dbias = sum dS over the rows
// that see the key, taken where dK is.
struct AttendBackwardParams {
  AttendParams forward;            // o and lse hold the forward results
  const void* grad_o = nullptr;    // [T, Hq, D] activation type
  const void* grad_lse = nullptr;  // [Hq, T] accumulate type; may be null
  void* grad_q = nullptr;          // [T, Hq, D] activation type
  void* grad_k = nullptr;          // [sum kv_length, Hkv, D] activation type
  void* grad_v = nullptr;          // [sum kv_length, Hkv, D]
};

Status attend_backward(const Backend& backend, const AttendBackwardParams& params,
                       std::span<std::byte> workspace);
std::size_t attend_backward_workspace_bytes(const Backend& backend,
                                            const AttendBackwardParams& params);

}  // namespace infllm
