// SPDX-License-Identifier: Apache-2.0
//
// The blocks that a tile of neighbouring tokens needs: the union of their selections, ascending,
// each with the tokens that chose it. A kernel walks the union once, so a loaded block serves every
// token of the tile that wants it.
#pragma once

#include <cstdint>

#include "infllm/core/arena.h"
#include "infllm/ops/attend.h"

namespace infllm::cuda::sm80 {

inline constexpr int kUnionTokens = 32;  // a tile has at most that many: the bits of a word

struct UnionEntry {
  std::int32_t block;
  std::uint32_t tokens;  // bit i: token i of the tile chose the block
};

// Lists of all (KV head, tile slot); slots as in token_tile.cuh.
struct UnionLists {
  UnionEntry* entries = nullptr;   // [Hkv, slots, capacity]
  std::int32_t* counts = nullptr;  // [Hkv, slots]
  std::int64_t slots = 0;
  std::int64_t capacity = 0;  // a list's longest: all blocks, or every token's own selection
};

// Sizes, without memory.
UnionLists union_lists(const AttendParams& params, int tile_tokens);

std::size_t union_bytes(const AttendParams& params, int tile_tokens);

// Builds the lists of the sparse sequences in `arena`. Blocks after a token's own, and numbers that
// are no blocks, are left out.
Result<UnionLists> build_union_lists(const Backend& backend, const AttendParams& params,
                                     int tile_tokens, Arena& arena);

}  // namespace infllm::cuda::sm80
