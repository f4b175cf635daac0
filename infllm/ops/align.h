// SPDX-License-Identifier: Apache-2.0
//
// The selection-alignment loss: how far the scores that choose blocks are from where dense
// attention looks. Selection carries no gradient, and through attention alone a small model does
// not learn to be found by mean-pooled keys; this loss teaches queries and keys exactly that,
// without a parameter more (docs/algorithm.md).
//
// For a row, the token at position p, and KV head g, the choosable blocks are those that score()
// ranks: F = the blocks b with init_blocks <= b < first_local_block(p), whatever the budget, that
// have a visible window (all of them, unless windows are longer than a block). Over the group's G
// heads h, with KC1, KC2 and the visible windows of block b as in score.h:
//
//   target      A[b]   = mean over h of the dense attention that q_h pays to block b:
//                        sum over t in b of exp(scale q_h . K[t, g] - LSE over all t <= p)
//   prediction  x_h[j] = scale q_h . KC1[j, g] - N_h,  N_h = LSE of scale q_h . KC2[m, g] over the
//                        visible m (0 if there are none; LseSource::kFine: of KC1)
//               s[j]   = log sum over h of exp x_h[j]
//               R[b]   = max of s[j] over the windows of b;  r = soft-max of R over F
//   loss        L      = - sum over F of A[b] log r[b]
//
// A is a constant; the gradient reaches q through x and k through both kinds of pooled keys:
//
//   dR[b]   = r[b] sum(A) - A[b]      goes to ds of the window that is the maximum, j(b)
//   dx_h[j] = exp(x_h[j] - s[j]) ds[j]
//   dq_h    = scale (sum_j dx_h[j] KC1[j] - X_h sum_m n_h[m] KC2[m]),  X_h = sum_j dx_h[j],
//             n_h = soft-max of the coarse logits
//   dKC1[j] = scale sum dx_h[j] q_h   dKC2[m] = -scale sum X_h n_h[m] q_h    over rows and heads
//   dK[t]   = sum of dKC / size over the windows that hold t
//
// Pooled keys are the cache's, rounded to its type as selection sees them; their rounding has the
// gradient of the identity. exp(R) is score()'s R before its rounding.
//
//   AlignParams p{.pages = pages, .batch = batch, .config = config, .heads_q = 32, .scale = scale,
//                 .q = q, .rows = rows, .num_rows = 512, .loss = loss, .norms = norms,
//                 .grad_scores = grad_scores, .windows = windows};
//   INFLLM_TRY(align(backend, p, workspace));              // the mean of loss is the caller's
//   AlignBackwardParams b{.forward = p, .grad_loss = grad_loss, .grad_q = gq, .grad_k = gk};
//   INFLLM_TRY(align_backward(backend, b, workspace));
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/kv_cache.h"

namespace infllm {

struct AlignParams {
  KvPages pages;  // pooled by compress(); whether a sequence attends sparsely does not matter here
  Batch batch;
  SparseConfig config;
  std::int32_t heads_q = 0;
  float scale = 0;                // head_dim ^ -1/2
  const void* q = nullptr;        // [T, Hq, D] activation type, as attention takes them
  const void* q_score = nullptr;  // [T, Hq, D] before RoPE, when config.use_nope
  // [R] tokens of the packed axis, ascending for speed; numbers outside [0, T) are no rows: loss
  // and gradients of 0. Null: all tokens, R = T.
  const std::int32_t* rows = nullptr;
  std::int32_t num_rows = 0;  // R

  // A row without choosable blocks has a loss of 0. N = blocks_in(batch.max_kv_length). What
  // align_backward() needs is written complete: 0, and -1 in windows, outside of F.
  void* loss = nullptr;             // [Hkv, R] accumulate type
  void* norms = nullptr;            // [Hq, R] accumulate type: N_h; 0 in rows without F
  void* grad_scores = nullptr;      // [Hkv, R, N] accumulate type: dR
  std::int32_t* windows = nullptr;  // [Hkv, R, N] j(b); of equal ones the lowest
};

Status align(const Backend& backend, const AlignParams& params, std::span<std::byte> workspace);
std::size_t align_workspace_bytes(const Backend& backend, const AlignParams& params);

struct AlignBackwardParams {
  AlignParams forward;              // norms, grad_scores and windows hold the forward results
  const void* grad_loss = nullptr;  // [Hkv, R] accumulate type
  // Both are overwritten, in the activation type; sums are taken in the accumulate type. Under
  // use_nope these are gradients of what scores: q_score, and the keys before RoPE.
  void* grad_q = nullptr;  // [R, Hq, D], in the order of rows
  void* grad_k = nullptr;  // [sum kv_length, Hkv, D], 0 where no window has a gradient
};

Status align_backward(const Backend& backend, const AlignBackwardParams& params,
                      std::span<std::byte> workspace);
std::size_t align_backward_workspace_bytes(const Backend& backend,
                                           const AlignBackwardParams& params);

}  // namespace infllm
