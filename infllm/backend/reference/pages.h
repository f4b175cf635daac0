// SPDX-License-Identifier: Apache-2.0
//
// The cache of this column. A page is a few planes of doubles, one row of D per token or window:
//
//   keys [Hkv, block_size, D]   values [Hkv, block_size, D]
//   fine [Hkv, block_size / kernel_stride, D]   coarse [Hkv, block_size / (4 kernel_stride), D]
//   keys before RoPE [Hkv, block_size, D], if the layout has them
#pragma once

#include <algorithm>

#include "infllm/ops/kv_cache.h"

namespace infllm::reference {

class Pages {
 public:
  Pages(const KvPages& pages, const Batch& batch) : pages_(pages), batch_(batch) {
    const KvLayout& layout = pages.layout;
    const std::int64_t tokens = layout.config.block_size;
    fine_per_page_ = layout.pooled_keys ? tokens / layout.config.kernel_stride : 0;
    coarse_per_page_ = layout.pooled_keys ? tokens / layout.config.coarse_stride() : 0;
    values_ = layout.kv_heads * tokens;
    fine_ = values_ + layout.kv_heads * tokens;
    coarse_ = fine_ + layout.kv_heads * fine_per_page_;
    score_keys_ = coarse_ + layout.kv_heads * coarse_per_page_;
    rows_ = score_keys_ + (layout.score_keys() ? layout.kv_heads * tokens : 0);
  }

  std::int64_t bytes() const {
    return rows_ * pages_.layout.head_dim * static_cast<std::int64_t>(sizeof(double));
  }

  // Rows of D doubles.
  double* key(std::int32_t sequence, std::int32_t head, std::int64_t position) const {
    return row(sequence, head, position, tokens(), 0);
  }
  double* value(std::int32_t sequence, std::int32_t head, std::int64_t position) const {
    return row(sequence, head, position, tokens(), values_);
  }
  // What compress pools: the keys, or under use_nope the keys before RoPE.
  double* score_key(std::int32_t sequence, std::int32_t head, std::int64_t position) const {
    return row(sequence, head, position, tokens(), pages_.layout.score_keys() ? score_keys_ : 0);
  }
  double* fine(std::int32_t sequence, std::int32_t head, std::int64_t window) const {
    return row(sequence, head, window, fine_per_page_, fine_);
  }
  double* coarse(std::int32_t sequence, std::int32_t head, std::int64_t window) const {
    return row(sequence, head, window, coarse_per_page_, coarse_);
  }

 private:
  std::int64_t tokens() const { return pages_.layout.config.block_size; }

  // Row `index` of the sequence in the plane that begins at row `plane` of a page and has
  // `per_page` rows a head.
  double* row(std::int32_t sequence, std::int32_t head, std::int64_t index, std::int64_t per_page,
              std::int64_t plane) const {
    const std::int64_t table_row = std::int64_t{sequence} * batch_.max_pages;
    const std::int64_t page = batch_.page_table[table_row + index / per_page];
    const std::int64_t row_in_page = plane + head * per_page + index % per_page;
    return reinterpret_cast<double*>(static_cast<std::byte*>(pages_.data) +
                                     page * pages_.page_bytes) +
           row_in_page * pages_.layout.head_dim;
  }

  const KvPages& pages_;
  const Batch& batch_;
  std::int64_t fine_per_page_, coarse_per_page_;
  std::int64_t values_, fine_, coarse_, score_keys_, rows_;  // where each plane begins, in rows
};

// Where token `token` of the packed axis stands: its sequence, and its position there.
struct Place {
  std::int32_t sequence;
  std::int64_t position;
};

inline Place place_of(const Batch& batch, std::int64_t token) {
  // The last sequence that starts at or before the token: empty ones start there too, and come
  // first.
  const std::int32_t* starts = batch.query_start;
  const auto sequence = static_cast<std::int32_t>(
      std::upper_bound(starts, starts + batch.num_sequences + 1, token) - starts - 1);
  return {sequence, batch.kv_length[sequence] - (starts[sequence + 1] - token)};
}

inline bool is_sparse(const Batch& batch, std::int32_t sequence) {
  return batch.sparse != nullptr && batch.sparse[sequence] != 0;
}

}  // namespace infllm::reference
