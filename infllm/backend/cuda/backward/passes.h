// SPDX-License-Identifier: Apache-2.0
//
// The kernels of attend_backward.cu: each of them owns what it writes.
#pragma once

#include "infllm/backend/cuda/backward/choosers.h"
#include "infllm/backend/cuda/page.cuh"
#include "infllm/backend/cuda/sm80/union_lists.h"

namespace infllm::cuda::backward {

// Of a row (token, query head), [T, Hq].
struct RowStatistics {
  float lse;    // base 2; +inf where the row saw nothing, which makes its weights 0
  float delta;  // sum dO O - dLSE
};

struct BackwardArgs {
  PagePool pool;
  Batch batch;
  const void* q;
  const void* grad_o;
  const RowStatistics* stats;
  void* grad_q;
  void* grad_k;
  void* grad_v;
  float* part_sums;        // [part_capacity, 2, 64, D] dK and dV of cut blocks
  sm80::UnionLists lists;  // without entries: all sequences are dense
  Choosers choosers;
  int heads_q;
  int group;
  int tile_tokens;
  float scale;
  float c;  // exponent_of(scale)
};

// Of all rows: the first kernel of every column.
Status take_statistics(const Backend& backend, const AttendBackwardParams& params,
                       RowStatistics* stats);

// Tokens of a thread block of the token-major pass.
int tile_tokens(const AttendParams& params);

// dQ, token-major.
Status query_gradient(const Backend& backend, const AttendParams& forward,
                      const BackwardArgs& args);
// The same by itself, in its own workspace.
Status query_gradient(const Backend& backend, const AttendBackwardParams& params,
                      const RowStatistics* stats, std::span<std::byte> workspace);
std::size_t query_gradient_bytes(const AttendBackwardParams& params);
// dK and dV, block-major.
Status key_gradient(const Backend& backend, const AttendParams& forward, const BackwardArgs& args);

}  // namespace infllm::cuda::backward
