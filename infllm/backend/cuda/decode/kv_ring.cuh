// SPDX-License-Identifier: Apache-2.0
//
// Keys and values on their way into shared memory. Each warp has a ring of its own: a stage is its
// 16 tokens of a block, keys and values, so that no warp ever waits for another one.
//
// The 16-byte pieces of row r lie at piece index ^ (r % 8): ldmatrix then reads 8 rows of one piece
// from 8 different groups of banks, with and without transposition.
#pragma once

#include "infllm/backend/cuda/decode/row.cuh"
#include "infllm/backend/cuda/tile/mma.cuh"

namespace infllm::cuda::decode {

inline constexpr int kSliceTokens = 16;
inline constexpr int kBlockSlices = kPageTokens / kSliceTokens;
inline constexpr int kPieceElements = 8;

template <typename T, int kDim, int kStages>
struct KvRing {
  static constexpr int kPieces = kDim / kPieceElements;  // of a row

  struct alignas(128) Stage {
    T keys[kSliceTokens * kDim];
    T values[kSliceTokens * kDim];
  };

  // All lanes fetch `count` tokens into a stage.
  __device__ __forceinline__ void fetch(int stage, const T* keys, const T* values, int count) {
    counts[stage] = count;  // every lane the same number
    if (count == 0) return;
    fetch_rows(stages[stage].keys, keys, count);
    fetch_rows(stages[stage].values, values, count);
  }

  // Rows from `count` on are zero, so that a product with their weight 0 is 0.
  __device__ __forceinline__ static void fetch_rows(T* to, const T* from, int count) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int j = 0; j < kSliceTokens * kPieces / 32; ++j) {
      const int i = 32 * j + lane;
      const int row = i / kPieces;
      tile::cp_async_16(to + at(row, i % kPieces), from + row * kDim + i % kPieces * kPieceElements,
                        row < count);
    }
  }

  // Offset of a piece of a row.
  __device__ __forceinline__ static int at(int row, int piece) {
    return row * kDim + (piece ^ (row % 8)) * kPieceElements;
  }

  Stage stages[kStages];
  int counts[kStages];  // tokens that exist
};

}  // namespace infllm::cuda::decode
