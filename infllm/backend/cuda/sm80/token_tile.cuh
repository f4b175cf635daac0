// SPDX-License-Identifier: Apache-2.0
//
// How the prefill rows of this column cut their work: a thread block owns a tile of neighbouring
// tokens of one sequence and one KV head, and a tile's rows are its tokens' query heads of that
// group, packed so that 128 rows of matrix instructions are full for any group size.
//
// Tiles lie at multiples of their size in the sequence, so a token falls into the same tile however
// its prompt was cut into chunks. All sequences' tiles share one axis of tile_slots() slots:
// sequence b's begin at slot query_start[b] / size + 2 b, where the 2 covers cut tiles at both
// ends. Slots without tokens are skipped. The axis is as long as the packed tokens need, whatever
// the longest sequence.
#pragma once

#include "infllm/backend/cuda/page.cuh"

namespace infllm::cuda::sm80 {

inline constexpr int kTileRows = 128;  // rows of a thread block
inline constexpr int kWarpRows = 32;   // of each of its warps: every B fragment meets two A's
inline constexpr int kTileThreads = kTileRows;

inline std::int64_t tile_slots(const Batch& batch, int tile_tokens) {
  return batch.num_tokens / tile_tokens + 2 * std::int64_t{batch.num_sequences};
}

struct TokenTile {
  int sequence;
  int first;   // position of its first token
  int tokens;  // 0: an empty slot
  int token;   // its first token on the packed axis
};

// The sequence whose slots begin last at or before `slot`. All lanes of a warp call it.
__device__ inline int sequence_of_slot(const Batch& batch, int tile_tokens, int slot) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int found = -1;
  for (int base = 0; base < batch.num_sequences; base += 32) {
    const int b = base + lane;
    const bool starts_before =
        b < batch.num_sequences && batch.query_start[b] / tile_tokens + 2 * b <= slot;
    const unsigned before = __ballot_sync(0xffffffff, starts_before);
    found += __popc(before);
    if (before != 0xffffffff) break;
  }
  return found;
}

__device__ inline TokenTile token_tile(const Batch& batch, int tile_tokens, int slot) {
  const int index = sequence_of_slot(batch, tile_tokens, slot);
  const int start = batch.query_start[index];
  const int tokens = batch.query_start[index + 1] - start;
  const int length = batch.kv_length[index];
  const int begin = length - tokens;
  const int tile = begin / tile_tokens + slot - (start / tile_tokens + 2 * index);
  const int first = max(begin, tile * tile_tokens);
  const int last = min(length, (tile + 1) * tile_tokens);
  return {index, first, max(0, last - first), start + first - begin};
}

}  // namespace infllm::cuda::sm80
