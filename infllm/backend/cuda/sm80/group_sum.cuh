// SPDX-License-Identifier: Apache-2.0
//
// Sums over a group's heads, of a warp's products of 64 windows with 32 queries. A lane holds
// e[m][n][2 h + i]: window 16 m + 8 h + lane / 4, query 8 n + 2 (lane % 4) + i. A group's heads are
// kGroup neighbouring queries, kGroup a power of two, so a sum is taken within the lane as far as
// it goes and then among the four lanes of a window. There each lane keeps a part of the windows
// and hands the others on, so that no sum is computed twice.
#pragma once

namespace infllm::cuda::sm80 {

inline constexpr int kSumWindows = 64;
// Floats of a token's row of sums: the windows from kSumFirst on, and before them the last window
// of the tile before.
inline constexpr int kSumFirst = 4;
inline constexpr int kSumStride = kSumFirst + kSumWindows;

// Adds across lanes of which bit kBit differs: of `keep` and `give` the lanes with the bit unset
// keep the first.
template <int kBit>
__device__ __forceinline__ float add_halves(float first, float second, int lane) {
  const bool upper = (lane & kBit) != 0;
  const float keep = upper ? second : first;
  const float give = upper ? first : second;
  return keep + __shfl_xor_sync(0xffffffff, give, kBit);
}

// Writes sums[token][kSumFirst + window] for the 32 / kGroup tokens.
template <int kGroup>
__device__ __forceinline__ void sum_groups(const float (&e)[4][4][4], float* sums, int lane) {
  const int pair = lane & 3;
  float* to = sums + kSumFirst + lane / 4;
  if constexpr (kGroup == 1) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          to[(8 * n + 2 * pair + i % 2) * kSumStride + 16 * m + i / 2 * 8] = e[m][n][i];
        }
      }
    }
  } else if constexpr (kGroup == 2) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          to[(4 * n + pair) * kSumStride + 16 * m + 8 * h] = e[m][n][2 * h] + e[m][n][2 * h + 1];
        }
      }
    }
  } else if constexpr (kGroup == 4) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float sum = add_halves<1>(e[m][n][2 * h] + e[m][n][2 * h + 1],
                                          e[m + 2][n][2 * h] + e[m + 2][n][2 * h + 1], lane);
          to[(2 * n + pair / 2) * kSumStride + 16 * (m + pair % 2 * 2) + 8 * h] = sum;
        }
      }
    }
  } else {
    constexpr int kTiles = kGroup / 8;  // of queries in a group
#pragma unroll
    for (int token = 0; token < 4 / kTiles; ++token) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          x[m] = 0;
#pragma unroll
          for (int n = token * kTiles; n < (token + 1) * kTiles; ++n) {
            x[m] += e[m][n][2 * h] + e[m][n][2 * h + 1];
          }
        }
        // Lane `pair` ends up with the windows of m = pair.
        const float sum =
            add_halves<1>(add_halves<2>(x[0], x[2], lane), add_halves<2>(x[1], x[3], lane), lane);
        to[token * kSumStride + 16 * pair + 8 * h] = sum;
      }
    }
  }
}

__device__ __forceinline__ void sum_groups(int group, const float (&e)[4][4][4], float* sums,
                                           int lane) {
  switch (group) {
    case 1:
      return sum_groups<1>(e, sums, lane);
    case 2:
      return sum_groups<2>(e, sums, lane);
    case 4:
      return sum_groups<4>(e, sums, lane);
    case 8:
      return sum_groups<8>(e, sums, lane);
    case 16:
      return sum_groups<16>(e, sums, lane);
    default:
      return sum_groups<32>(e, sums, lane);
  }
}

}  // namespace infllm::cuda::sm80
