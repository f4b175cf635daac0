// SPDX-License-Identifier: Apache-2.0
//
// Running soft-max of the two rows that a lane holds of a wgmma accumulator (rows lane / 4 and
// lane / 4 + 8 of its warp, spread over the four lanes of a quad). With c = exponent_of(scale) and
// x the raw products:
//
//   m = a maximum of x seen so far, l = sum 2^(c (x - m)), o = sum 2^(c (x - m)) v
//
// m lags behind the true maximum by up to kSlack / c: as long as no weight exceeds 2^kSlack there
// is nothing to rescale, and the final division makes the result exact all the same.
#pragma once

#include "infllm/backend/cuda/powers.cuh"

namespace infllm::cuda::sm90 {

inline constexpr float kSlack = 8;  // in powers of two
inline constexpr float kInfinity = __builtin_huge_valf();

struct RowState {
  float m = kNoMaximum;
  float l = 0;  // this lane's share of the row
};

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Turns products s into weights, of the rows that `wanted` says; the others get 0 and keep their
// state. Returns the factors that o must be multiplied with.
template <int kCount>
__device__ __forceinline__ void weigh(float (&s)[kCount], const bool (&wanted)[2], float c,
                                      RowState (&state)[2], float (&factor)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    RowState& r = state[row];
    float top = s[2 * row];
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      top = fmaxf(top, fmaxf(s[i + 2 * row], s[i + 2 * row + 1]));
    }
    top = quad_max(top);
    const bool rises = wanted[row] && (top - r.m) * c > kSlack;
    const float m = rises ? top : r.m;
    factor[row] = rises ? tile::fast_exp2((r.m - m) * c) : 1.0f;
    r.m = m;
    // An infinite subtrahend makes every weight of an unwanted row zero.
    const float subtrahend = wanted[row] ? m * c : kInfinity;
    float sums[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& x = s[i + 2 * row + j];
        x = tile::fast_exp2(fmaf(x, c, -subtrahend));
        sums[j] += x;
      }
    }
    r.l = r.l * factor[row] + (sums[0] + sums[1]);
  }
}

// Products of columns beyond each row's limit become -infinity: `limit` is the last column that the
// row sees, `first` the column of s[0] of this lane.
template <int kCount>
__device__ __forceinline__ void mask_beyond(float (&s)[kCount], const int (&limit)[2], int first) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = first + i / 4 * 8 + i % 2;
    if (column > limit[i / 2 % 2]) s[i] = -kInfinity;
  }
}

template <int kCount>
__device__ __forceinline__ void rescale(float (&o)[kCount], const float (&factor)[2]) {
  if (!__any_sync(0xffffffff, factor[0] != 1.0f || factor[1] != 1.0f)) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] *= factor[i / 2 % 2];
}

}  // namespace infllm::cuda::sm90
