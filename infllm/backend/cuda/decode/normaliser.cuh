// SPDX-License-Identifier: Apache-2.0
//
// The soft-max's denominator while it is being added up: `sum` of 2^(x - top).
#pragma once

#include "infllm/backend/cuda/decode/row.cuh"

namespace infllm::cuda::decode {

struct Normaliser {
  __device__ __forceinline__ void add(float a, float b) {
    const float largest = fmaxf(top, fmaxf(a, b));
    const float base = largest == -kInfinity ? 0 : largest;
    sum = sum * tile::fast_exp2(top - base) + tile::fast_exp2(a - base) + tile::fast_exp2(b - base);
    top = largest;
  }

  // Of the lanes whose numbers differ in bits kFirst .. kEnd / 2.
  template <int kFirst, int kEnd>
  __device__ __forceinline__ void merge_lanes() {
    float largest = top;
#pragma unroll
    for (int step = kFirst; step < kEnd; step *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
    }
    sum *= tile::fast_exp2(top - (largest == -kInfinity ? 0 : largest));
    top = largest;
#pragma unroll
    for (int step = kFirst; step < kEnd; step *= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, step);
    }
  }

  // In powers of 2; -inf: nothing was added.
  __device__ __forceinline__ float lse() const { return sum > 0 ? top + __log2f(sum) : -kInfinity; }

  float top = -kInfinity;
  float sum = 0;
};

}  // namespace infllm::cuda::decode
