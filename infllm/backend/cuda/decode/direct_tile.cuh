// SPDX-License-Identifier: Apache-2.0
//
// Products of a group's queries with rows of the cache that go from memory into operands, without
// shared memory: heads are the rows (M) of the product, eight cached rows its columns (N).
//
// As in pooled_tile.cuh a lane takes the 8 neighbouring elements that a 16-byte load brings, where
// the instruction numbers 2 + 2 + 2 + 2 scattered ones: both sides agree on that order.
#pragma once

#include "infllm/backend/cuda/decode/row.cuh"
#include "infllm/backend/cuda/tile/mma.cuh"

namespace infllm::cuda::decode {

inline constexpr int kTileRows = 8;

// Loads in program order, unlike __ldg and its sisters; past L1, or through it for what all warps
// want. Without conditions: a load that may not happen is one whose result is copied, and the copy
// waits for it before the next load is issued.
__device__ __forceinline__ uint4 load_once(const void* from) {
  uint4 x;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}
__device__ __forceinline__ uint4 load_for_all(const void* from) {
  uint4 x;
  asm volatile("ld.global.ca.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

// Sixteen heads as the left operand: a lane has heads lane / 4 and lane / 4 + 8.
template <typename T, int kDim>
struct HeadQueries {
  // q: of the group's first head; in the place of heads that do not exist is the last one.
  __device__ __forceinline__ void load(const T* q, int heads) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int head = min(lane / 4 + 8 * r, heads - 1);
      const T* const row = q + head * kDim + 8 * (lane % 4);
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) words[r][i] = load_for_all(row + 32 * i);
    }
  }

  uint4 words[2][kDim / 32];
};

// Eight rows as the right operand: a lane has a quarter of row lane / 4.
template <typename T, int kDim>
struct DirectTile {
  // row: this lane's.
  __device__ __forceinline__ void load(const T* row) {
    const T* const from = row + 8 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) words[i] = load_once(from + 32 * i);
  }

  // x[2 r + j] += of head lane / 4 + 8 r and row 2 (lane % 4) + j; step i of kDim / 32.
  __device__ __forceinline__ void add_products(const HeadQueries<T, kDim>& q, int i,
                                               float (&x)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      tile::mma_m16n8k16<T>(x,
                            {word(q.words[0][i], 2 * half), word(q.words[1][i], 2 * half),
                             word(q.words[0][i], 2 * half + 1), word(q.words[1][i], 2 * half + 1)},
                            {word(words[i], 2 * half), word(words[i], 2 * half + 1)});
    }
  }

  uint4 words[kDim / 32];
};

// x[t][2 r + j]: the same of tile t.
template <typename T, int kDim, int kTiles>
__device__ __forceinline__ void multiply(const DirectTile<T, kDim> (&rows)[kTiles],
                                         const HeadQueries<T, kDim>& q, float (&x)[kTiles][4]) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int j = 0; j < 4; ++j) x[t][j] = 0;
  }
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) rows[t].add_products(q, i, x[t]);
  }
}

// Whether column 2 (lane % 4) + j of a tile is a row that exists: `rows` is the ballot of the lanes
// that have one.
__device__ __forceinline__ bool has_column(unsigned rows, int j) {
  return (rows >> (8 * (threadIdx.x % 4) + 4 * j) & 1) != 0;
}

}  // namespace infllm::cuda::decode
