// SPDX-License-Identifier: Apache-2.0
//
// Rows of a lane, and sums of 2^x that are kept beside their maximum: over the keys that a row
// meets, and over a group's heads.
#pragma once

#include "infllm/backend/cuda/align/rows.cuh"

namespace infllm::cuda::align {

// Rows of a lane in products of 32 rows a warp: row(i) for i in 0 .. 3.
struct LaneRows {
  __device__ LaneRows() : warp(tile::warp_index()), lane(static_cast<int>(threadIdx.x) % 32) {}
  __device__ int row(int i) const {
    return warp * kWarpRows + i / 2 * 16 + i % 2 * 8 + (lane >> 2);
  }
  __device__ int column(int n) const { return n * 8 + (lane & 3) * 2; }
  int warp;
  int lane;
};

// Maximum and sum of the lane's four rows over what it has seen; of whole rows after finish().
struct RunningSums {
  __device__ RunningSums() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      m[i] = kNoMaximum;
      l[i] = 0;
    }
  }
  // Takes 64 logits a row; those at or after limit[i] are none.
  __device__ void take(const float (&s)[2][8][4], const int (&limit)[4], float c,
                       const LaneRows& at) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float top = m[i];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (at.column(n) + e < limit[i]) top = fmaxf(top, s[i / 2][n][i % 2 * 2 + e] * c);
        }
      }
      l[i] *= tile::fast_exp2(m[i] - top);
      m[i] = top;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float x = fmaf(s[i / 2][n][i % 2 * 2 + e], c, -top);
          if (at.column(n) + e < limit[i]) l[i] += tile::fast_exp2(x);
        }
      }
    }
  }
  // Over the four lanes of a row.
  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float top = fmaxf(m[i], __shfl_xor_sync(0xffffffff, m[i], 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
      l[i] *= tile::fast_exp2(m[i] - top);
      m[i] = top;
      l[i] += __shfl_xor_sync(0xffffffff, l[i], 1);
      l[i] += __shfl_xor_sync(0xffffffff, l[i], 2);
    }
  }
  float m[4];
  float l[4];
};

// Over the heads of a group, whose x lie below each other in rows of kScoreStride floats.
struct GroupSum {
  __device__ GroupSum(const float* column, int group) : top(column[0]), sum(0) {
    for (int h = 1; h < group; ++h) top = fmaxf(top, column[h * kScoreStride]);
    for (int h = 0; h < group; ++h) sum += tile::fast_exp2(column[h * kScoreStride] - top);
  }
  __device__ float log() const { return top + log2f(sum); }
  float top;
  float sum;
};

}  // namespace infllm::cuda::align
