// SPDX-License-Identifier: Apache-2.0
//
// The blocks that the tokens of a tile chose, each once: what a tile of sparse attention loads.
//
//   list of a tile = blocks b, each with the set of the tile's tokens that chose b
//
// First come the singles: blocks that tokens of at most one warp (16 rows) of each four chose, and
// that end before the tile's first token. Both parts ascend. Tokens number from 0 at the tile's
// first row; ids beyond the token's own block, and blocks whose page does not exist, are left out.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "infllm/ops/attend.h"

namespace infllm::cuda::sm90 {

struct UnionLists {
  // Entry i of a list with `singles` singles. The two parts grow towards each other.
  __host__ __device__ std::int64_t place(std::int64_t list, int i, int singles) const {
    return list * capacity + (i < singles ? i : capacity - 1 - (i - singles));
  }

  std::int32_t* counts = nullptr;   // [tiles] entries of each list
  std::int32_t* singles = nullptr;  // [tiles] how many of them are singles
  std::int32_t* blocks = nullptr;   // [tiles, capacity] by place()
  void* tokens = nullptr;           // [tiles, capacity] bit t: token t; 16 bits wide, or 64
  std::int64_t capacity = 0;
  std::int32_t token_bytes = 2;  // 2 or 8: of a set
  std::int32_t warp_tokens = 0;  // tokens of 16 rows; 0: nothing counts as single
};

// Entries that a list may need.
std::int64_t union_capacity(const AttendParams& params, int tile_tokens);

// Builds the lists of tiles first .. first + count - 1 of the numbering in tiles.cuh.
void launch_union(const AttendParams& params, int tile_tokens, int first, int count,
                  const UnionLists& lists, cudaStream_t stream);

}  // namespace infllm::cuda::sm90
