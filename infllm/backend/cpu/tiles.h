// SPDX-License-Identifier: Apache-2.0
//
// The sizes of the cpu column's attention tiles, in one place. docs/kernels/cpu-attention.md
// derives them and keeps the measurements of the runners-up.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace infllm::cpu {

// Tokens of a cache page, and of a selectable block: one 64-lane tile of keys.
inline constexpr int kPageTokens = 64;

// Rows (token x head of the group) that share one pass over the selected blocks. Their state, about
// 900 bytes a row for head dimension 128, is meant to stay in L2. 256 and
// 1024 rows: attend within 4%, but score 10% slower with 256.
inline constexpr int kTileRows = 512;

// Rows that go through QK, soft-max and PV together: K (16 KB) stays in L1 while their logits are
// made, and so does V for their outputs. 24 rows: attend 7% slower; 96: 5% slower.
inline constexpr int kGroupRows = 48;

// A decode step cuts its list of blocks into at most kMaxSplits pieces of at least kMinSplitBlocks:
// the cut follows the number of blocks alone, so the answer does not depend on the thread count.
inline constexpr int kMaxSplits = 32;
inline constexpr int kMinSplitBlocks = 8;

// Windows of one decode task of score, a multiple of 64.
inline constexpr int kScoreSegment = 512;

// Tokens of a prefill tile: a power of two that divides a block, so that all tokens of a tile have
// the same own block.
constexpr int tile_tokens(int group) {
  const int fit = std::clamp(kTileRows / group, 1, kPageTokens);
  return static_cast<int>(std::bit_floor(static_cast<unsigned>(fit)));
}

}  // namespace infllm::cpu
