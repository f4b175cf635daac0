// SPDX-License-Identifier: Apache-2.0
//
// The inverse of a selection: which tokens chose a block, ascending, for every (KV head, sequence,
// block), and how the long lists are cut into work items. Everything happens on the device:
//
//   count     a thread block counts the choices of a segment of tokens, per block
//   add up    running counts over a sequence's segments; the last one is the list's length
//   plan      one thread block: where lists begin, which of them are cut into parts
//   fill      a segment's tokens go, one after another, behind those of the segments before
//
// In a dense sequence a block's choosers are all tokens from the block on: no list is kept.
#pragma once

#include <cstdint>

#include "infllm/core/arena.h"
#include "infllm/ops/attend.h"

namespace infllm::cuda::backward {

// One (KV head, sequence, block).
struct ChosenBlock {
  std::int64_t start;       // its list within Choosers::tokens
  std::int32_t count;       // tokens that chose it
  std::int32_t first_part;  // index of its first part's sums, -1: it is one part
};

// A part of a cut block: tokens part * Choosers::part_tokens .. of its list.
struct Part {
  std::int32_t block;  // index of the ChosenBlock, -1: none
  std::int32_t part;
};

struct Choosers {
  ChosenBlock* blocks = nullptr;   // [Hkv, B, max_blocks]
  Part* parts = nullptr;           // [part_capacity]
  std::int32_t* tokens = nullptr;  // [Hkv, T, columns], on the packed axis; null: all are dense
  std::int32_t* counts = nullptr;  // [Hkv, segments, max_blocks] running counts
  std::int64_t segments = 0;       // slots of segment_tokens tokens as in sm80/token_tile.cuh
  std::int32_t segment_tokens = 0;
  std::int32_t max_blocks = 0;
  std::int64_t num_blocks = 0;  // of all heads and sequences
  std::int32_t heads_kv = 0;
  std::int32_t part_tokens = 0;  // lists longer than this are cut
  std::int32_t part_capacity = 0;
};

// Sizes, without memory. They depend on the host's maxima alone.
Choosers choosers(const AttendParams& params);

// Calls taker(pointer, count) for each array of a workspace.
template <typename Taker>
void take(const AttendParams& params, Choosers& c, Taker&& taker) {
  taker(c.blocks, c.num_blocks);
  taker(c.parts, c.part_capacity);
  if (c.segments == 0) return;
  taker(c.tokens, std::int64_t{c.heads_kv} * params.batch.num_tokens * params.columns);
  taker(c.counts, c.heads_kv * c.segments * c.max_blocks);
}

// Of the sums that the parts of cut blocks leave: [part_capacity, 2, 64, D] dK and dV.
std::int64_t part_floats(const AttendParams& params, const Choosers& choosers);

// Launches what fills the arrays.
Status build_choosers(const Backend& backend, const AttendParams& params, const Choosers& choosers);

}  // namespace infllm::cuda::backward
