// SPDX-License-Identifier: Apache-2.0
//
// Logits of 16 pooled keys at a time, one warp, without shared memory. Keys are the rows (M) of the
// product and the group's heads its columns (N), so that the sum over heads is mostly within a
// thread.
//
// A product over D may visit the elements in any order, as long as both operands agree on it. So a
// lane does not take elements 2 pair, 2 pair + 1, 2 pair + 8, ... of each 16 as the instruction
// counts them, but the 8 neighbours that one 16-byte load brings: elements 32 i + 8 pair .. + 7 of
// its row, which are its share of the instruction's steps 2 i and 2 i + 1. Global memory is then
// read straight into operands, 64 bytes a row and load, and every byte once.
#pragma once

#include "infllm/backend/cuda/decode/row.cuh"
#include "infllm/backend/cuda/tile/mma.cuh"

namespace infllm::cuda::decode {

inline constexpr int kTileKeys = 16;

// The queries of up to 8 kTiles heads, as the right operand. Heads that do not exist are zero.
template <typename T, int kDim, int kTiles>
struct GroupQueries {
  __device__ __forceinline__ void load(const T* q, int heads) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int head = 8 * t + lane / 4;
      const auto* row = reinterpret_cast<const uint4*>(q + head * kDim) + lane % 4;
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) {
        words[t][i] = make_uint4(0, 0, 0, 0);
        if (head < heads) words[t][i] = __ldcg(row + 4 * i);
      }
    }
  }

  uint4 words[kTiles][kDim / 32];
};

// Sixteen keys as the left operand: a lane has rows lane / 4 and lane / 4 + 8.
template <typename T, int kDim, int kTiles>
struct KeyTile {
  // x[t][2 r + j]: of row lane / 4 + 8 r and head 8 t + 2 (lane % 4) + j. Arbitrary where the page
  // was -1.
  __device__ __forceinline__ void times(const GroupQueries<T, kDim, kTiles>& q,
                                        float (&x)[kTiles][4]) const {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 4; ++j) x[t][j] = 0;
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const std::uint32_t a[4] = {word(words[0][i], 2 * half), word(words[1][i], 2 * half),
                                      word(words[0][i], 2 * half + 1),
                                      word(words[1][i], 2 * half + 1)};
          const std::uint32_t b[2] = {word(q.words[t][i], 2 * half),
                                      word(q.words[t][i], 2 * half + 1)};
          tile::mma_m16n8k16<T>(x[t], a, b);
        }
      }
    }
  }

  uint4 words[2][kDim / 32];
};

// One kind of pooled keys of one sequence and KV head, 16 windows at a time. They come in two
// steps, because pages are found in a table: look_up() asks the table, load() follows the answer.
template <typename T, int kDim, int kTiles>
struct PooledPlane : PooledRows {
  using Tile = KeyTile<T, kDim, kTiles>;

  // The pages of a lane's two rows of tile `tile`, if it is before `end_tile`; -1: no such window,
  // or its page does not exist.
  __device__ __forceinline__ int2 look_up(const PagePool& pool, const Sequence& sequence, int tile,
                                          int end_tile) const {
    const int window = tile * kTileKeys + static_cast<int>(threadIdx.x) % 32 / 4;
    const int last = tile < end_tile ? end : 0;
    return {window < last ? sequence.page(window >> page_shift, pool.num_pages) : -1,
            window + 8 < last ? sequence.page((window + 8) >> page_shift, pool.num_pages) : -1};
  }

  // Rows of pages that are -1 stay as they are: reading some other row in their place would be one
  // that many thread blocks read at once.
  __device__ __forceinline__ void load(const PagePool& pool, int2 pages, Tile& to) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int row = lane / 4 & ((1 << page_shift) - 1);  // of both: 8 is a multiple of a page
    load_row(pool.plane<const T>(pages.x, offset) + row * kDim, pages.x >= 0, to.words[0]);
    load_row(pool.plane<const T>(pages.y, offset) + row * kDim, pages.y >= 0, to.words[1]);
  }

  // Past L1: a block reads no row twice.
  __device__ __forceinline__ static void load_row(const T* row, bool exists,
                                                  uint4 (&to)[kDim / 32]) {
    if (!exists) return;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      to[i] = __ldcg(reinterpret_cast<const uint4*>(row) + 4 * i + threadIdx.x % 4);
    }
  }
};

}  // namespace infllm::cuda::decode
