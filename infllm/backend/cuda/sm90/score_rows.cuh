// SPDX-License-Identifier: Apache-2.0
//
// What a thread does with its part of a tile of logits: two rows r and r + 8 of the warp's sixteen
// (r = lane / 4), and of each row the columns 8 j + 2 (lane % 4) + {0, 1} (tile/wgmma.cuh). A row
// is one query head of one token, a column one pooled key.
#pragma once

#include <cmath>

#include "infllm/backend/cuda/powers.cuh"

namespace infllm::cuda::sm90 {

inline constexpr int kTileKeys = 128;
inline constexpr int kTileValues = 64 * kTileKeys / 128;  // of a thread

// The running log-sum-exp of one row, each thread over its own columns. Logits are raw products;
// `exponent` turns them into powers of two.
struct RunningNormaliser {
  float most = -INFINITY;  // raw
  float sum = 0;           // of 2^(exponent (x - most))

  // Row 0 or 1 of the thread's two; hidden columns are -inf.
  template <int kRow>
  __device__ void add(float (&x)[kTileValues], float exponent) {
    float best = most;
#pragma unroll
    for (int i = 2 * kRow; i < kTileValues; i += 4) best = fmaxf(best, fmaxf(x[i], x[i + 1]));
    const float shift = best == -INFINITY ? 0.0f : best * exponent;
    sum *= tile::fast_exp2(fmaf(most, exponent, -shift));
    float even = 0;
    float odd = 0;
#pragma unroll
    for (int i = 2 * kRow; i < kTileValues; i += 4) {
      even += tile::fast_exp2(fmaf(x[i], exponent, -shift));
      odd += tile::fast_exp2(fmaf(x[i + 1], exponent, -shift));
    }
    sum += even + odd;
    most = best;
  }

  // Of the whole row, in powers of two; a row that saw nothing makes every probability 0.
  __device__ float finish(float exponent) const {
    const auto other = [](float x, int lanes) { return __shfl_xor_sync(0xffffffff, x, lanes); };
    float best = fmaxf(most, other(most, 1));
    best = fmaxf(best, other(best, 2));
    if (best == -INFINITY) return INFINITY;
    float total = sum * tile::fast_exp2((most - best) * exponent);
    total += other(total, 1);
    total += other(total, 2);
    return fmaf(best, exponent, log2f(total));
  }
};

// Hides the columns of row 0 or 1 from `limit` on; `column` is the thread's first one.
template <int kRow>
__device__ void hide_columns(float (&x)[kTileValues], int column, int limit) {
#pragma unroll
  for (int i = 2 * kRow; i < kTileValues; i += 4) {
    if (column + i * 2 - 4 * kRow >= limit) x[i] = -INFINITY;
    if (column + i * 2 - 4 * kRow + 1 >= limit) x[i + 1] = -INFINITY;
  }
}

// One step of a reduction that leaves half of the columns with each of two lanes: of kCount pairs
// of columns, those whose number has the bit kStride go to the lane with that bit.
template <int kCount, int kStride>
__device__ void halve_columns(float (&x)[32], bool upper) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i & kStride) continue;
    const int to = i / (2 * kStride) * kStride + i % kStride;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float low = x[2 * i + e];
      const float high = x[2 * (i + kStride) + e];
      const float received = __shfl_xor_sync(0xffffffff, upper ? low : high, 4 * kStride);
      x[2 * to + e] = (upper ? high : low) + received;
    }
  }
}

// Adds up kRows rows (2, 4 or 8 neighbouring lane groups) of columns x[2 j + {0, 1}]. The lane of
// group g then holds the sums of columns j = kRows i + g % kRows in x[2 i + {0, 1}].
template <int kRows>
__device__ void sum_lanes(float (&x)[32]) {
  const int group = threadIdx.x % 32 / 4;
  if constexpr (kRows == 8) {
    halve_columns<16, 4>(x, group & 4);
    halve_columns<8, 2>(x, group & 2);
    halve_columns<4, 1>(x, group & 1);
  } else if constexpr (kRows == 4) {
    halve_columns<16, 2>(x, group & 2);
    halve_columns<8, 1>(x, group & 1);
  } else {
    halve_columns<16, 1>(x, group & 1);
  }
}

// Writes the group sums of a warp's probabilities p to sums[token][column].
template <int kGroup>
__device__ void sum_groups(const float (&p)[kTileValues], float (*sums)[kTileKeys]) {
  constexpr int kRows = kGroup < 8 ? kGroup : 8;
  const int group = threadIdx.x % 32 / 4;
  const int column = 8 * (group % kRows) + threadIdx.x % 4 * 2;
  const auto store = [&](const float(&x)[32], int token) {
#pragma unroll
    for (int i = 0; i < 16 / kRows; ++i) {
      *reinterpret_cast<float2*>(&sums[token][8 * kRows * i + column]) =
          make_float2(x[2 * i], x[2 * i + 1]);
    }
  };
  float x[32];
  if constexpr (kGroup == 16) {
#pragma unroll
    for (int i = 0; i < 32; ++i) x[i] = p[i / 2 * 4 + i % 2] + p[i / 2 * 4 + i % 2 + 2];
    sum_lanes<kRows>(x);
    store(x, 0);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 32; ++i) x[i] = p[i / 2 * 4 + i % 2 + 2 * half];
      sum_lanes<kRows>(x);
      store(x, (group + 8 * half) / kGroup);
    }
  }
}

}  // namespace infllm::cuda::sm90
