// SPDX-License-Identifier: Apache-2.0
//
// What a warp of the mma.sync kernels multiplies: 16 kRows rows of its own with a tile of keys, and
// weights, as the first product left them in registers, with a tile of values. Tiles lie in shared
// memory as smem_tile.cuh says; accumulators are [16 rows][8 columns][4 of a lane].
//
//   float s[2][8][4];
//   multiply_transposed<T, D>(s, rows, 0, keys, 0, lane);  // S = Q K^T, 32 rows, 64 keys
//   multiply_add<T, D>(o, s, values, 0, lane);             // O += S V, S rounded to T
#pragma once

#include "infllm/backend/cuda/sm80/smem_tile.cuh"
#include "infllm/backend/cuda/tile/control.cuh"

namespace infllm::cuda::sm80 {

template <int kRows, int kColumns>
__device__ __forceinline__ void clear(float (&x)[kRows][kColumns][4]) {
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[m][n][e] = 0;
    }
  }
}

// x = the rows from `row` on times the 8 kColumns keys from `key` on.
template <typename T, int D, int kRows, int kColumns>
__device__ __forceinline__ void multiply_transposed(float (&x)[kRows][kColumns][4],
                                                    const std::byte* rows, int row,
                                                    const std::byte* keys, int key, int lane) {
  static_assert(kColumns % 2 == 0);
  clear(x);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    std::uint32_t a[kRows][4];
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      SmemTile<D>::a_fragment(a[m], rows, row + m * 16, k, lane);
    }
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      std::uint32_t b[4];
      SmemTile<D>::bt_fragments(b, keys, key + n * 16, k, lane);
      const std::uint32_t low[2] = {b[0], b[1]};
      const std::uint32_t high[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        tile::mma_m16n8k16<T>(x[m][2 * n], a[m], low);
        tile::mma_m16n8k16<T>(x[m][2 * n + 1], a[m], high);
      }
    }
  }
}

// sum += weights times the 8 kColumns values from `value` on.
template <typename T, int D, int kRows, int kColumns>
__device__ __forceinline__ void multiply_add(float (&sum)[kRows][D / 8][4],
                                             const float (&weights)[kRows][kColumns][4],
                                             const std::byte* values, int value, int lane) {
#pragma unroll
  for (int k = 0; k < kColumns / 2; ++k) {
    std::uint32_t a[kRows][4];
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      a[m][0] = tile::pack2<T>(weights[m][2 * k][0], weights[m][2 * k][1]);
      a[m][1] = tile::pack2<T>(weights[m][2 * k][2], weights[m][2 * k][3]);
      a[m][2] = tile::pack2<T>(weights[m][2 * k + 1][0], weights[m][2 * k + 1][1]);
      a[m][3] = tile::pack2<T>(weights[m][2 * k + 1][2], weights[m][2 * k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      std::uint32_t b[4];
      SmemTile<D>::b_fragments(b, values, value + k * 16, n, lane);
      const std::uint32_t low[2] = {b[0], b[1]};
      const std::uint32_t high[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        tile::mma_m16n8k16<T>(sum[m][2 * n], a[m], low);
        tile::mma_m16n8k16<T>(sum[m][2 * n + 1], a[m], high);
      }
    }
  }
}

}  // namespace infllm::cuda::sm80
