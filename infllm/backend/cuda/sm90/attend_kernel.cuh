// SPDX-License-Identifier: Apache-2.0
//
// Prefill attention on Hopper, dense causal and sparse (ops/attend.h). A thread block takes tiles
// (tiles.cuh) one after another. Its first warpgroup feeds shared memory (attend_feed.cuh); each
// further one computes 64 rows = 64 / G tokens with all G heads of the KV head:
//
//   for each block that one of its tokens wants:  s = q k^T;  weights p of s;  o += p v
#pragma once

#include "infllm/backend/cuda/sm90/attend_dense.cuh"
#include "infllm/backend/cuda/sm90/attend_feed.cuh"
#include "infllm/backend/cuda/sm90/attend_sparse.cuh"

namespace infllm::cuda::sm90 {

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    attend_kernel(const __grid_constant__ AttendMaps maps, const __grid_constant__ AttendArgs a) {
  using namespace tile;
  extern __shared__ std::byte memory[];
  const int warp = warp_index();
  auto& shared = begin_shared<C, AttendShared<C>>(memory);
  if (warp < 4) {
    setmaxnreg_dec<C::kFeedRegisters>();
    if (warp == 0) feed_blocks<C>(shared, a, maps.k, maps.v);
    if (warp >= 1 && warp <= C::kGroups) feed_rows<C>(shared, a, warp - 1, maps.q);
  } else {
    setmaxnreg_inc<C::kComputeRegisters>();
    if constexpr (C::kSparse) {
      compute_sparse<C>(shared, a, warp / 4 - 1);
    } else {
      compute_dense<C>(shared, a, warp / 4 - 1);
    }
  }
}

}  // namespace infllm::cuda::sm90
