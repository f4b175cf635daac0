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

#include "infllm/backend/cuda/page.cuh"
#include "infllm/backend/cuda/tile/mma.cuh"

namespace infllm::cuda::decode {

inline constexpr int kTileKeys = 16;

// Element 2 i of `x` and 2 i + 1 are what steps 2 i and 2 i + 1 of the product need.
__device__ __forceinline__ std::uint32_t word(const uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

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
  // From two rows; null: none.
  __device__ __forceinline__ void load(const T* low, const T* high) {
    const int pair = static_cast<int>(threadIdx.x) % 4;
    exists[0] = low != nullptr;
    exists[1] = high != nullptr;
    load_row(low, pair, words[0]);
    load_row(high, pair, words[1]);
  }

  // x[t][2 r + j]: of row lane / 4 + 8 r and head 8 t + 2 (lane % 4) + j.
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
  bool exists[2];

 private:
  // Past L1: no row is read twice by a block.
  __device__ __forceinline__ static void load_row(const T* row, int pair, uint4 (&to)[kDim / 32]) {
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      to[i] = make_uint4(0, 0, 0, 0);
      if (row != nullptr) to[i] = __ldcg(reinterpret_cast<const uint4*>(row) + 4 * i + pair);
    }
  }
};

// One kind of pooled keys of one sequence and KV head.
template <typename T, int kDim>
struct PooledPlane {
  // The row of a window, or null where it or its page does not exist.
  __device__ __forceinline__ const T* row(const PagePool& pool, const Sequence& sequence,
                                          int window) const {
    if (window >= end) return nullptr;
    const int page = sequence.page(window / rows, pool.num_pages);
    return page < 0 ? nullptr : pool.plane<const T>(page, offset) + window % rows * kDim;
  }

  std::int64_t offset;  // of the plane in a page
  int rows;             // of a page
  int end;              // windows that exist
};

}  // namespace infllm::cuda::decode
