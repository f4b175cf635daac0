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
    attend_kernel(const __grid_constant__ CUtensorMap q_map,
                  const __grid_constant__ CUtensorMap k_map,
                  const __grid_constant__ CUtensorMap v_map, const __grid_constant__ AttendArgs a) {
  using namespace tile;
  extern __shared__ std::byte memory[];
  auto& shared =
      *reinterpret_cast<AttendShared<C>*>(memory + (1024 - shared_address(memory) % 1024) % 1024);
  const int warp = warp_index();
  if (threadIdx.x == 0) {
    constexpr int kWarps = C::kGroups * 4;
    for (int i = 0; i < C::kStages; ++i) {
      mbarrier_init(&shared.ring.k_full[i], 1);
      mbarrier_init(&shared.ring.v_full[i], 1);
      mbarrier_init(&shared.ring.k_empty[i], kWarps);
      mbarrier_init(&shared.ring.v_empty[i], kWarps);
    }
    for (int i = 0; i < C::kGroups; ++i) {
      mbarrier_init(&shared.q_full[i], 1);
      mbarrier_init(&shared.q_empty[i], 4);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&shared.work_full[i], 1);
      mbarrier_init(&shared.work_empty[i], kWarps + C::kGroups);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (warp < 4) {
    setmaxnreg_dec<C::kFeedRegisters>();
    if (warp == 0) feed_blocks<C>(shared, a, k_map, v_map);
    if (warp >= 1 && warp <= C::kGroups) feed_queries<C>(shared, a, q_map, warp - 1);
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
