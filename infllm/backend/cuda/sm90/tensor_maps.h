// SPDX-License-Identifier: Apache-2.0
//
// Tensor maps of what attention and scoring read. Dimensions are split into panels of 64, which
// come last in a box, so that it lands in shared memory as shared_memory.cuh says.
#pragma once

#include "infllm/backend/cuda/page.cuh"
#include "infllm/backend/cuda/tile/tensor_map.h"
#include "infllm/ops/attend.h"

namespace infllm::cuda::sm90 {

// A 64-row plane of keys or values, wherever its page is: [pages, Hkv, D / 64, 64 tokens, 64], for
// tma_load_5d(0, 0, panel, head, page) of `box_panels` panels. Page num_pages reads zeros.
// `offset` is that of head 0's plane within a page (PageMap).
inline Result<CUtensorMap> plane_map(const KvPages& pages, std::int64_t offset,
                                     std::uint32_t box_panels) {
  const KvLayout& layout = pages.layout;
  const auto row = static_cast<std::uint64_t>(layout.head_dim * size_of(layout.dtype));
  const auto panels = static_cast<std::uint64_t>(layout.head_dim / 64);
  return tile::make_tensor_map(
      {.data = static_cast<const std::byte*>(pages.data) + offset,
       .dtype = layout.dtype,
       .rank = 5,
       .size = {64, kPageTokens, panels, static_cast<std::uint64_t>(layout.kv_heads),
                static_cast<std::uint64_t>(pages.num_pages)},
       .stride_bytes = {row, 128, kPageTokens * row, static_cast<std::uint64_t>(pages.page_bytes)},
       .box = {64, kPageTokens, box_panels, 1, 1}});
}

// Rows like the queries', [T, Hq, D], as [D / 64, T, Hq, 64], for tma_load_4d(0, head, token,
// panel) of some neighbouring tokens and the G query heads of one KV head.
inline Result<CUtensorMap> rows_map(const KvLayout& layout, std::int32_t heads_q,
                                    std::int32_t num_tokens, const void* rows,
                                    std::uint32_t box_tokens, std::uint32_t box_panels) {
  const auto dim = static_cast<std::uint64_t>(layout.head_dim);
  const auto heads = static_cast<std::uint64_t>(heads_q);
  const auto group = static_cast<std::uint32_t>(heads_q / layout.kv_heads);
  return tile::make_tensor_map(
      {.data = rows,
       .dtype = layout.dtype,
       .rank = 4,
       .size = {64, heads, static_cast<std::uint64_t>(num_tokens), dim / 64},
       .stride_bytes = {2 * dim, 2 * dim * heads, 128},
       .box = {64, group, box_tokens, box_panels}});
}

// Of a call of attend: its queries, or what has their shape.
inline Result<CUtensorMap> rows_map(const AttendParams& p, const void* rows,
                                    std::uint32_t box_tokens, std::uint32_t box_panels) {
  return rows_map(p.pages.layout, p.heads_q, p.batch.num_tokens, rows, box_tokens, box_panels);
}

}  // namespace infllm::cuda::sm90
