// SPDX-License-Identifier: Apache-2.0
//
// Pooled keys of a head, and tiles of 64 of them gathered from the pages.
#pragma once

#include <hwy/cache_control.h>

#include <cstring>

#include "infllm/backend/cpu/page.h"
#include "infllm/backend/cpu/tile-inl.h"

INFLLM_CPU_BEGIN

inline constexpr std::int64_t kAheadOfGather = 4096;  // bytes
inline constexpr std::int64_t kLineBytes = 64;

// A kind of pooled keys of one head.
struct PooledKeys {
  std::int64_t size;
  std::int64_t stride;
  std::int64_t rows;    // in a page
  std::int64_t offset;  // of the plane

  // Windows whose last token is at or before `position`.
  std::int64_t visible(std::int64_t position) const {
    return windows_in(position + 1, size, stride);
  }
};

inline PooledKeys fine_keys(const SparseConfig& config, const PageMap& map, std::int64_t head) {
  return {config.kernel_size, config.kernel_stride, map.fine_rows, map.fine(head)};
}
inline PooledKeys coarse_keys(const SparseConfig& config, const PageMap& map, std::int64_t head) {
  return {config.coarse_size(), config.coarse_stride(), map.coarse_rows, map.coarse(head)};
}
// Those that normalise scores.
inline PooledKeys norm_keys(const SparseConfig& config, const PageMap& map, std::int64_t head) {
  return config.lse_source == LseSource::kCoarse ? coarse_keys(config, map, head)
                                                 : fine_keys(config, map, head);
}

// `count` windows from `first` on, as [D / per, 64]; lanes after them keep whatever they had. A
// page contributes one short piece, which no hardware prefetcher expects: they are fetched
// kAheadOfGather bytes early.
template <class Num>
void gather_pooled(const Sequence& sequence, const PooledKeys& keys, std::int64_t dim,
                   std::int64_t first, int count, typename Num::Element* to) {
  using Element = typename Num::Element;
  const std::int64_t steps = dim / Num::kPer;
  const std::int64_t bytes = steps * keys.rows * static_cast<std::int64_t>(sizeof(Element));
  const std::int64_t pages = ceil_div(sequence.length, kPageTokens);
  for (int i = 0; i < count;) {
    const std::int64_t page = (first + i) / keys.rows;
    const std::int64_t slot = (first + i) % keys.rows;
    const int run = static_cast<int>(std::min<std::int64_t>(keys.rows - slot, count - i));
    const auto* from = sequence.plane<const Element>(page, keys.offset);
    const std::int64_t later = page + ceil_div(kAheadOfGather, bytes);
    if (later < pages) {
      const auto* line = sequence.plane<const std::byte>(later, keys.offset);
      for (std::int64_t at = 0; at < bytes; at += kLineBytes) hwy::Prefetch(line + at);
    }
    if (run == 4) {  // the released windows: a page's four at once
      for (std::int64_t k = 0; k < steps; ++k) {
        std::memcpy(to + k * kPageTokens + i, from + k * keys.rows + slot, 4 * sizeof(Element));
      }
    } else {
      for (std::int64_t k = 0; k < steps; ++k) {
        for (int j = 0; j < run; ++j) {
          to[k * kPageTokens + i + j] = from[k * keys.rows + slot + j];
        }
      }
    }
    i += run;
  }
}

INFLLM_CPU_END
