// SPDX-License-Identifier: Apache-2.0
//
// The work of score_select, cut into items: one KV head of one sequence and a tile of neighbouring
// tokens. Tiles begin at multiples of their size, which divides a block, so all tokens of an item
// have the same own block, the same forced blocks and the same candidates, and a token falls into
// the same tile however its prompt was cut into chunks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "infllm/backend/cuda/page.cuh"

namespace infllm::cuda::sm90 {

inline constexpr int kWindowsPerBlock = kPageTokens / kFineStride;

// What the kernel is told besides its tensor maps.
struct ScoreTask {
  Batch batch;
  std::int32_t heads_kv = 0;
  std::int32_t columns = 0;  // K
  std::int32_t init_blocks = 0;
  std::int32_t local_blocks = 0;      // of the local window, the own block included
  bool fine_normaliser = false;       // LseSource::kFine
  float exponent = 0;                 // exponent_of(scale): logits as powers of two
  std::int32_t* selection = nullptr;  // [Hkv, T, K]
  std::int64_t items = 0;
};

// Items of a batch; a sequence has as many tiles as the longest one, of which some are empty.
inline std::int64_t count_items(const Batch& batch, int heads_kv, int tile_tokens) {
  return std::int64_t{batch.num_sequences} * heads_kv *
         ((batch.max_query_length - 1) / tile_tokens + 2);
}

struct ScoreItem {
  // Later tiles have more keys, so they come first: the last items to be started are short.
  __device__ ScoreItem(const ScoreTask& task, std::int64_t index, int tile_tokens) {
    const int planes = task.batch.num_sequences * task.heads_kv;
    plane = static_cast<int>(index % planes);
    head = plane % task.heads_kv;
    const Sequence sequence(task.batch, plane / task.heads_kv);
    if (!sequence.sparse || sequence.tokens <= 0) return;
    const int from = sequence.first_position();
    const int tile = (sequence.length - 1) / tile_tokens - static_cast<int>(index / planes);
    if (tile < from / tile_tokens) return;
    first = tile * tile_tokens;
    begin = max(first, from);
    end = min(first + tile_tokens, sequence.length);
    token = sequence.first_token + first - from;

    own = first / kPageTokens;
    const int columns = task.columns;
    first_local = max(max(0, own - task.local_blocks + 1), own + 1 - columns);
    const int local = own + 1 - first_local;
    sink = min(min(task.init_blocks, first_local), columns - local);
    free = min(columns - local - sink, first_local - sink);
    if (free == 0 || free == first_local - sink) return;
    const int visible = task.fine_normaliser ? fine_windows(end) : coarse_windows(end);
    norm_windows = visible;
    score_windows = first_local * kWindowsPerBlock;
  }

  __device__ bool exists() const { return end > begin; }
  // Otherwise no choice is to be made: every candidate is taken, or none.
  __device__ bool scored() const { return score_windows > 0; }

  int plane = 0;  // sequence * Hkv + head
  int head = 0;
  int first = 0;  // position of the tile's first token
  int begin = 0;  // positions that belong to this step
  int end = 0;
  int token = 0;  // of position `first`, on the packed axis; may be outside of the sequence

  // Blocks: [0, sink) and [first_local, own] are forced, `free` of those between are chosen.
  int own = 0;
  int first_local = 0;
  int sink = 0;
  int free = 0;

  int norm_windows = 0;  // visible to the last token
  int score_windows = 0;
};

}  // namespace infllm::cuda::sm90
