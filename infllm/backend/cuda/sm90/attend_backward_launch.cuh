// SPDX-License-Identifier: Apache-2.0
//
// Host side of what walks over blocks of keys (the sparse dK and dV pass, the dense one that makes
// dQ too): what both kernels are given.
#pragma once

#include <algorithm>
#include <array>
#include <bit>

#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/sm90/attend_backward_config.cuh"
#include "infllm/backend/cuda/sm90/tensor_maps.h"
#include "infllm/core/arena.h"

namespace infllm::cuda::sm90 {

// Without sums of parts, whose place in the workspace the passes know.
inline KeyArgs key_args(const AttendBackwardParams& params, const RowStatistics* stats) {
  const AttendParams& forward = params.forward;
  const std::int32_t heads = forward.pages.layout.kv_heads;
  return {.batch = forward.batch,
          .pool = PagePool(forward.pages),
          .stats = stats,
          .grad_k = params.grad_k,
          .grad_v = params.grad_v,
          .sums = nullptr,
          .scale = forward.scale,
          .c = exponent_of(forward.scale),
          .heads = heads,
          .group_log2 = std::countr_zero(static_cast<unsigned>(forward.heads_q / heads))};
}

// Q by single tokens and by as many as a warp brings of 64 rows, dO likewise, K, V.
using KeyMaps = std::array<CUtensorMap, 6>;

template <class C>
Result<KeyMaps> key_maps(const AttendBackwardParams& p, const KeyArgs& args) {
  const AttendParams& forward = p.forward;
  const std::uint32_t tokens = std::max(1u, (C::kHalves ? 32u : 64u) >> args.group_log2);
  return KeyMaps{INFLLM_TRY(rows_map(forward, forward.q, 1, 1)),
                 INFLLM_TRY(rows_map(forward, forward.q, tokens, 1)),
                 INFLLM_TRY(rows_map(forward, p.grad_o, 1, 1)),
                 INFLLM_TRY(rows_map(forward, p.grad_o, tokens, 1)),
                 INFLLM_TRY(plane_map(forward.pages, args.pool.map.key(0), C::kPanels)),
                 INFLLM_TRY(plane_map(forward.pages, args.pool.map.value(0), C::kPanels))};
}

// Starts a kernel that walks over blocks of keys.
template <class C, class Shared, class Args>
Status start_keys(void (*kernel)(CUtensorMap, CUtensorMap, CUtensorMap, CUtensorMap, CUtensorMap,
                                 CUtensorMap, Args),
                  std::int64_t blocks, cudaStream_t stream, const KeyMaps& maps, const Args& args) {
  return start("attend_backward", kernel, static_cast<unsigned>(blocks), C::kThreads,
               shared_bytes<Shared>(), stream, maps[0], maps[1], maps[2], maps[3], maps[4], maps[5],
               args);
}

}  // namespace infllm::cuda::sm90
