// SPDX-License-Identifier: Apache-2.0
//
// How the cpu column lays a cache page out. An element is a pair of neighbouring bf16 values (or
// one float), so that one broadcast and one dot product instruction advance 64 keys by two
// dimensions, without packing and without horizontal sums:
//
//   keys     [D / per][64 tokens] elements of neighbouring dimensions      per = 2 for bf16, 1 for
//   f32 values   [64 / per][D]        elements of neighbouring tokens pooled   [D / per][rows] like
//   keys; rows of the windows that begin in this page
//
// A page holds, head after head, keys, values and (use_nope) keys before RoPE; then each head's
// fine and then each head's coarse pooled keys. Every plane begins at a cache line.
#pragma once

#include <cstdint>

#include "infllm/backend/cpu/tiles.h"
#include "infllm/core/arena.h"
#include "infllm/ops/kv_cache.h"

namespace infllm::cpu {

struct PageMap {
  explicit PageMap(const KvLayout& layout)
      : fine_rows(layout.pooled_keys ? kPageTokens / layout.config.kernel_stride : 0),
        coarse_rows(layout.pooled_keys ? kPageTokens / layout.config.coarse_stride() : 0),
        planes(layout.score_keys() ? 3 : 2),
        plane(round(kPageTokens, layout)),
        fine_plane(round(fine_rows, layout)),
        coarse_plane(round(coarse_rows, layout)),
        heads(layout.kv_heads) {}

  std::int64_t key(std::int64_t head) const { return head * planes * plane; }
  std::int64_t value(std::int64_t head) const { return key(head) + plane; }
  // The keys that are pooled: the third plane under use_nope, the attended keys otherwise.
  std::int64_t pooled_key(std::int64_t head) const {
    return key(head) + (planes == 3 ? 2 * plane : 0);
  }
  std::int64_t fine(std::int64_t head) const { return heads * planes * plane + head * fine_plane; }
  std::int64_t coarse(std::int64_t head) const { return fine(heads) + head * coarse_plane; }
  std::int64_t bytes() const { return coarse(heads); }

  std::int64_t fine_rows;  // of one head in one page
  std::int64_t coarse_rows;

 private:
  static std::int64_t round(std::int64_t rows, const KvLayout& layout) {
    return static_cast<std::int64_t>(
        align_up(static_cast<std::size_t>(rows * layout.head_dim * size_of(layout.dtype))));
  }

  std::int64_t planes;
  std::int64_t plane;
  std::int64_t fine_plane;
  std::int64_t coarse_plane;
  std::int64_t heads;
};

// The pages of one sequence.
struct Sequence {
  Sequence(const KvPages& pages, const Batch& batch, std::int32_t index)
      : first_token(batch.query_start[index]),
        tokens(batch.query_start[index + 1] - first_token),
        length(batch.kv_length[index]),
        sparse(batch.any_sparse && batch.sparse[index] != 0),
        data_(static_cast<std::byte*>(pages.data)),
        page_bytes_(pages.page_bytes),
        table_(batch.page_table + std::int64_t{index} * batch.max_pages) {}

  // The plane at `offset` of the page of `block`.
  template <typename Element>
  Element* plane(std::int64_t block, std::int64_t offset) const {
    return reinterpret_cast<Element*>(data_ + table_[block] * page_bytes_ + offset);
  }

  // Position of this step's first token.
  std::int64_t first_position() const { return std::int64_t{length} - tokens; }

  std::int32_t first_token;  // on the packed axis
  std::int32_t tokens;       // of this step
  std::int32_t length;       // keys, this step's included
  bool sparse;

 private:
  std::byte* data_;
  std::int64_t page_bytes_;
  const std::int32_t* table_;
};

// Tiles of a sequence: position / size, so that a token falls into the same tile however its prompt
// was cut into chunks.
struct TokenTile {
  std::int64_t first;  // position
  int tokens;          // 0: no such tile
};

inline TokenTile token_tile(const Sequence& sequence, std::int64_t index, int size) {
  const std::int64_t begin = sequence.first_position();
  const std::int64_t tile = begin / size + index;
  const std::int64_t first = std::max<std::int64_t>(begin, tile * size);
  const std::int64_t last = std::min<std::int64_t>(sequence.length, (tile + 1) * size);
  return {first, static_cast<int>(std::max<std::int64_t>(0, last - first))};
}

// No sequence of a batch has more tiles than this.
inline std::int64_t max_tiles(const Batch& batch, int size) {
  return ceil_div(batch.max_query_length, size) + 1;
}

}  // namespace infllm::cpu
