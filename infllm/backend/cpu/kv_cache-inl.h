// SPDX-License-Identifier: Apache-2.0
//
// Writing keys and values into pages, and reading them back. The transposition into page order
// (page.h) is paid once here, so that attention never repacks.
#pragma once

#include <cstring>

#include "infllm/backend/cpu/layout.h"
#include "infllm/backend/cpu/page.h"
#include "infllm/backend/cpu/tile-inl.h"
#include "infllm/ops/kernels.h"

INFLLM_CPU_BEGIN

// Rows [count, D] of `stride` floats to slots first, first + 1, ... of a key plane.
template <class Num>
void put_keys(const float* rows, std::int64_t stride, int count, int first, std::int64_t head_dim,
              typename Num::Element* plane) {
  for (std::int64_t i = 0; i < head_dim / Num::kPer; ++i) {
    for (int t = 0; t < count; ++t) {
      plane[i * kPageTokens + first + t] = Num::make(rows + t * stride + i * Num::kPer, 1);
    }
  }
}

// The same for a value plane.
template <class Num>
void put_values(const float* rows, std::int64_t stride, int count, int first, std::int64_t head_dim,
                typename Num::Element* plane) {
  for (int t = 0; t < count;) {
    const int slot = first + t;
    auto* to = plane + slot / Num::kPer * head_dim;
    const float* from = rows + t * stride;
    if (Num::kPer == 2 && slot % 2 == 0 && t + 1 < count) {
      for (std::int64_t i = 0; i < head_dim; ++i) to[i] = Num::make(from + i, stride);
      t += 2;
    } else {
      for (std::int64_t i = 0; i < head_dim; ++i) Num::set(to + i, slot % Num::kPer, from[i]);
      t += 1;
    }
  }
}

// One task writes what a step adds to one page. The first token of a page clears it, so that keys
// and values after a sequence's end are finite: their weight is 0, and 0 * NaN would not be.
template <class Num>
void append_page(const KvAppendParams& p, const PageMap& map, std::int32_t sequence_index,
                 std::int64_t block_index) {
  const Sequence sequence(p.pages, p.batch, sequence_index);
  const std::int64_t begin = sequence.first_position();
  const std::int64_t block = begin / kPageTokens + block_index;
  const std::int64_t first = std::max(begin, block * kPageTokens);
  const std::int64_t last = std::min<std::int64_t>(sequence.length, (block + 1) * kPageTokens);
  if (sequence.tokens == 0 || first >= last) return;
  const KvLayout& layout = p.pages.layout;
  const std::int64_t stride = std::int64_t{layout.kv_heads} * layout.head_dim;
  const int count = static_cast<int>(last - first);
  const int slot = static_cast<int>(first % kPageTokens);
  const bool clear = slot == 0 && count < kPageTokens;
  const std::int64_t token = sequence.first_token + (first - begin);
  const std::size_t bytes = sizeof(typename Num::Element) *
                            static_cast<std::size_t>(kPageTokens * layout.head_dim / Num::kPer);
  const auto put = [&](const void* source, std::int64_t head, std::int64_t offset, auto&& writer) {
    auto* plane = sequence.plane<typename Num::Element>(block, offset);
    if (clear) std::memset(plane, 0, bytes);
    writer(static_cast<const float*>(source) + token * stride + head * layout.head_dim, stride,
           count, slot, layout.head_dim, plane);
  };
  for (std::int64_t head = 0; head < layout.kv_heads; ++head) {
    put(p.k, head, map.key(head), put_keys<Num>);
    put(p.v, head, map.value(head), put_values<Num>);
    if (layout.score_keys()) put(p.k_score, head, map.pooled_key(head), put_keys<Num>);
  }
}

Status run_kv_append(const Backend& backend, const KvAppendParams& p, std::span<std::byte>) {
  const PageMap map(p.pages.layout);
  return with_element(p.pages.layout.dtype, [&]<class Num>() -> Status {
    const std::int64_t blocks = max_tiles(p.batch, kPageTokens);
    backend.pool->parallel_for(p.batch.num_sequences * blocks, [&](std::int64_t task, int) {
      append_page<Num>(p, map, static_cast<std::int32_t>(task / blocks), task % blocks);
    });
    return {};
  });
}

// Everything of one sequence, from its pages to packed rows.
template <class Num>
void read_sequence(const KvReadParams& p, const PageMap& map, std::int32_t index,
                   std::int64_t first_key, std::int64_t first_fine, std::int64_t first_coarse) {
  using Element = typename Num::Element;
  constexpr std::int64_t kPer = Num::kPer;
  const KvLayout& layout = p.pages.layout;
  const Sequence sequence(p.pages, p.batch, index);
  const std::int64_t dim = layout.head_dim;
  // Row r of a plane of keys or pooled keys, `rows` of them in a page.
  const auto read_rows = [&](void* out, std::int64_t first, std::int64_t count, std::int64_t rows,
                             std::int64_t head, std::int64_t offset) {
    for (std::int64_t r = 0; r < count; ++r) {
      const auto* plane = sequence.plane<const Element>(r / rows, offset);
      float* to = static_cast<float*>(out) + ((first + r) * layout.kv_heads + head) * dim;
      for (std::int64_t d = 0; d < dim; ++d) {
        to[d] = Num::get(plane[d / kPer * rows + r % rows], static_cast<int>(d % kPer));
      }
    }
  };
  for (std::int64_t head = 0; head < layout.kv_heads; ++head) {
    if (p.k != nullptr) {
      read_rows(p.k, first_key, sequence.length, kPageTokens, head, map.key(head));
    }
    if (p.v != nullptr) {
      for (std::int64_t t = 0; t < sequence.length; ++t) {
        const auto* plane = sequence.plane<const Element>(t / kPageTokens, map.value(head));
        const std::int64_t slot = t % kPageTokens;
        float* to = static_cast<float*>(p.v) + ((first_key + t) * layout.kv_heads + head) * dim;
        for (std::int64_t d = 0; d < dim; ++d) {
          to[d] = Num::get(plane[slot / kPer * dim + d], static_cast<int>(slot % kPer));
        }
      }
    }
    if (p.fine != nullptr) {
      read_rows(p.fine, first_fine, layout.config.fine_windows(sequence.length), map.fine_rows,
                head, map.fine(head));
    }
    if (p.coarse != nullptr) {
      read_rows(p.coarse, first_coarse, layout.config.coarse_windows(sequence.length),
                map.coarse_rows, head, map.coarse(head));
    }
  }
}

Status run_kv_read(const Backend&, const KvReadParams& p, std::span<std::byte>) {
  const PageMap map(p.pages.layout);
  return with_element(p.pages.layout.dtype, [&]<class Num>() -> Status {
    std::int64_t keys = 0;
    std::int64_t fine = 0;
    std::int64_t coarse = 0;
    for (std::int32_t i = 0; i < p.batch.num_sequences; ++i) {
      read_sequence<Num>(p, map, i, keys, fine, coarse);
      const std::int64_t length = p.batch.kv_length[i];
      keys += length;
      fine += p.pages.layout.config.fine_windows(length);
      coarse += p.pages.layout.config.coarse_windows(length);
    }
    return {};
  });
}

INFLLM_CPU_END
