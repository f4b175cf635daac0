// SPDX-License-Identifier: Apache-2.0
//
// Results of warps that attended to different keys of one row, on their way into one: the first
// step of every merge of the decode rows, through shared memory.
#pragma once

#include "infllm/backend/cuda/decode/attend_warp.cuh"
#include "infllm/backend/cuda/decode/row.cuh"

namespace infllm::cuda::decode {

// Weights of soft-max results with maximum `top` and sum `sum`, one a lane and kLanes neighbouring
// lanes together, in the result of them all. Leaves that one's maximum and sum in their place.
template <int kLanes>
__device__ __forceinline__ float merge_weight(float& top, float& sum) {
  const float own = top;
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
  }
  const float weight = own == -kInfinity ? 0 : tile::fast_exp2(own - top);
  sum *= weight;
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return weight;
}

template <int kDim, int kWarps>
struct WarpResults {
  static constexpr int kPadded = kDim + 8;  // eight rows of a quad's pairs in different banks
  static constexpr int kLanes = 32 * kWarps / kRowHeads;  // of a head: 8, or 16

  template <typename Warp>
  __device__ __forceinline__ void put(Warp& attention, int warp) {
    attention.finish(&o[warp][0][0], kPadded, top[warp], sum[warp]);
  }

  // All threads, after a barrier: values(head, column, four of its outputs) of each thread's share,
  // unnormalised, and total(head, maximum, sum).
  template <typename Values, typename Total>
  __device__ __forceinline__ void merge(const Values& values, const Total& total) const {
    const int head = static_cast<int>(threadIdx.x) / kLanes;
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    float own_top = lane < kWarps ? top[lane][head] : -kInfinity;
    float own_sum = lane < kWarps ? sum[lane][head] : 0;
    const float weight = merge_weight<kLanes>(own_top, own_sum);
    float4 all[kDim / kLanes / 4] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float factor = __shfl_sync(kAllLanes, weight, w, kLanes);
#pragma unroll
      for (int i = 0; i < kDim / kLanes / 4; ++i) {
        const float4 x = *reinterpret_cast<const float4*>(&o[w][head][4 * (i * kLanes + lane)]);
        all[i].x += factor * x.x;
        all[i].y += factor * x.y;
        all[i].z += factor * x.z;
        all[i].w += factor * x.w;
      }
    }
#pragma unroll
    for (int i = 0; i < kDim / kLanes / 4; ++i) values(head, 4 * (i * kLanes + lane), all[i]);
    if (lane == 0) total(head, own_top, own_sum);
  }

  alignas(16) float o[kWarps][kRowHeads][kPadded];
  float top[kWarps][kRowHeads];
  float sum[kWarps][kRowHeads];
};

}  // namespace infllm::cuda::decode
