// SPDX-License-Identifier: Apache-2.0
//
// How prefill attention is cut into tiles. A tile is `tile_tokens` neighbouring tokens of one
// sequence with the query heads of one KV head: its rows share every K and V block that is loaded.
// Tiles begin at multiples of tile_tokens of the position, so that a token falls into the same tile
// however its prompt was cut into chunks.
//
// Tiles are numbered head by head, sequence by sequence, the last position of a sequence first:
// long work starts early, and tiles that run at the same time read the same keys.
//
//   const int tiles = count_tiles(batch, tile_tokens, sparse);       // of one KV head
//   const Tile tile = find_tile(batch, tile_tokens, sparse, tiles, index);
//
// Both are called by a whole warp, whose lanes look at 32 sequences at a time and get one answer.
#pragma once

#include "infllm/backend/cuda/page.cuh"

namespace infllm::cuda::sm90 {

struct Tile {
  std::int32_t index = -1;  // -1: there is no such tile
  std::int32_t head;        // of K and V
  std::int32_t sequence;
  std::int32_t first_token;  // packed token of row 0; lies before `begin` in a first, partial tile
  std::int32_t begin, end;   // the sequence's tokens on the packed axis
  std::int32_t position;     // of first_token
  std::int32_t length;       // keys of the sequence

  // Blocks up to that of the last token.
  __device__ int blocks(int tile_tokens) const {
    return (min(position + tile_tokens, length) - 1) / kPageTokens + 1;
  }
};

// Host: no batch of this shape has more tiles for one KV head.
inline std::int64_t most_tiles(const Batch& batch, int tile_tokens) {
  return batch.num_tokens / tile_tokens + 2 * std::int64_t{batch.num_sequences};
}

__device__ inline bool attends_sparsely(const Batch& batch, int sequence) {
  return batch.any_sparse && batch.sparse != nullptr && batch.sparse[sequence] != 0;
}

__device__ inline int tiles_of(const Batch& batch, int tile_tokens, bool sparse, int sequence) {
  if (sequence >= batch.num_sequences) return 0;
  const int tokens = batch.query_start[sequence + 1] - batch.query_start[sequence];
  if (tokens <= 0 || attends_sparsely(batch, sequence) != sparse) return 0;
  const int length = batch.kv_length[sequence];
  return (length - 1) / tile_tokens - (length - tokens) / tile_tokens + 1;
}

__device__ inline int count_tiles(const Batch& batch, int tile_tokens, bool sparse) {
  int sum = 0;
  for (int first = 0; first < batch.num_sequences; first += 32) {
    sum += tiles_of(batch, tile_tokens, sparse, first + static_cast<int>(threadIdx.x % 32));
  }
  return __reduce_add_sync(0xffffffff, sum);
}

__device__ inline Tile find_tile(const Batch& batch, int tile_tokens, bool sparse, int tiles,
                                 int heads, int index) {
  constexpr unsigned kAll = 0xffffffff;
  const int lane = static_cast<int>(threadIdx.x % 32);
  Tile tile;
  if (tiles == 0 || index >= tiles * heads) return tile;
  tile.head = index / tiles;
  int rest = index - tile.head * tiles;
  for (int first = 0; first < batch.num_sequences; first += 32) {
    const int count = tiles_of(batch, tile_tokens, sparse, first + lane);
    int sum = count;  // of this lane's sequence and those before
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAll, sum, step);
      if (lane >= step) sum += other;
    }
    const unsigned beyond = __ballot_sync(kAll, sum > rest);
    if (beyond == 0) {
      rest -= __shfl_sync(kAll, sum, 31);
      continue;
    }
    const int owner = __ffs(static_cast<int>(beyond)) - 1;
    const int from_last = rest - __shfl_sync(kAll, sum - count, owner);
    tile.index = index;
    tile.sequence = first + owner;
    tile.begin = batch.query_start[tile.sequence];
    tile.end = batch.query_start[tile.sequence + 1];
    tile.length = batch.kv_length[tile.sequence];
    tile.position = ((tile.length - 1) / tile_tokens - from_last) * tile_tokens;
    tile.first_token = tile.end - tile.length + tile.position;
    return tile;
  }
  return tile;
}

}  // namespace infllm::cuda::sm90
