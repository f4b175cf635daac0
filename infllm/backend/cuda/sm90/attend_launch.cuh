// SPDX-License-Identifier: Apache-2.0
//
// Host side of attend_kernel.cuh: workspace, tensor maps, launches of one configuration.
#pragma once

#include <algorithm>
#include <bit>

#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/shapes.cuh"
#include "infllm/backend/cuda/sm90/attend_kernel.cuh"
#include "infllm/backend/cuda/tile/tensor_map.h"
#include "infllm/core/arena.h"

namespace infllm::cuda::sm90 {

// Lists are most of the workspace. They are built and used for some tiles at a time, of which there
// are enough to keep all multiprocessors busy for several rounds.
inline constexpr std::int64_t kListBytes = std::int64_t{128} << 20;
inline constexpr std::int64_t kFewestTiles = 2048;

// How one configuration cuts a call.
template <class C>
struct AttendPlan {
  explicit AttendPlan(const AttendParams& p)
      : heads(p.pages.layout.kv_heads),
        group(p.heads_q / heads),
        tile_tokens(C::kRows / group),
        tiles(heads * most_tiles(p.batch, tile_tokens)),
        capacity(C::kSparse ? union_capacity(p, tile_tokens) : 0),
        chunk(C::kSparse ? std::min(tiles, std::max(kFewestTiles, kListBytes / list_bytes()))
                         : tiles),
        chunks(ceil_div(tiles, chunk)) {}

  // The arrays of the workspace, through an Arena or an ArenaSize.
  template <class Taker>
  void take(Taker&& taker, unsigned*& taken, UnionLists& lists) const {
    taker(taken, chunks);
    if (!C::kSparse) return;
    auto* sets = static_cast<typename C::TokenSet*>(lists.tokens);
    taker(lists.counts, chunk);
    taker(lists.singles, chunk);
    taker(lists.blocks, chunk * capacity);
    taker(sets, chunk * capacity);
    lists.tokens = sets;
    lists.capacity = capacity;
    lists.token_bytes = sizeof(typename C::TokenSet);
    lists.warp_tokens = 16 / group;
  }

  std::int32_t heads;
  std::int32_t group;
  std::int32_t tile_tokens;
  std::int64_t tiles;
  std::int64_t capacity;  // of a list
  std::int64_t chunk;     // tiles at a time
  std::int64_t chunks;

 private:
  // Of a full list.
  std::int64_t list_bytes() const {
    return std::max<std::int64_t>(1, capacity) *
           static_cast<std::int64_t>(sizeof(std::int32_t) + sizeof(typename C::TokenSet));
  }
};

template <class C>
std::size_t attend_bytes_of(const AttendParams& params) {
  const AttendPlan<C> plan(params);
  ArenaSize size;
  unsigned* taken = nullptr;
  UnionLists lists;
  plan.take([&]<typename T>(T*&, std::int64_t count) { size.take<T>(count); }, taken, lists);
  return size.bytes();
}

// One 64-row plane of keys or values, wherever its page is.
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

// Rows like the queries', [T, Hq, D], in boxes of some neighbouring tokens and the G query heads of
// one KV head.
inline Result<CUtensorMap> rows_map(const AttendParams& p, const void* rows,
                                    std::uint32_t box_tokens, std::uint32_t box_panels) {
  const auto dim = static_cast<std::uint64_t>(p.pages.layout.head_dim);
  const auto group = static_cast<std::uint32_t>(p.heads_q / p.pages.layout.kv_heads);
  const auto heads = static_cast<std::uint64_t>(p.heads_q);
  return tile::make_tensor_map(
      {.data = rows,
       .dtype = p.pages.layout.dtype,
       .rank = 4,
       .size = {64, heads, static_cast<std::uint64_t>(p.batch.num_tokens), dim / 64},
       .stride_bytes = {2 * dim, 2 * dim * heads, 128},
       .box = {64, group, box_tokens, box_panels}});
}

template <class C>
Status run_attend(const AttendParams& params, std::span<std::byte> workspace, cudaStream_t stream,
                  int sm_count) {
  const AttendPlan<C> plan(params);
  Arena arena(workspace);
  unsigned* taken = nullptr;
  UnionLists lists;
  plan.take([&]<typename T>(T*& array, std::int64_t count) { array = arena.take<T>(count); }, taken,
            lists);
  const PagePool pool(params.pages);
  const CUtensorMap q_map = INFLLM_TRY(
      rows_map(params, params.q, static_cast<std::uint32_t>(64 / plan.group), C::kPanels));
  const CUtensorMap k_map =
      INFLLM_TRY(plane_map(params.pages, pool.map.key(0), C::kBlocks == 1 ? C::kPanels : 1));
  const CUtensorMap v_map = INFLLM_TRY(plane_map(params.pages, pool.map.value(0), C::kPanels));
  constexpr std::size_t kShared = sizeof(AttendShared<C>) + 1024;
  static_assert(kShared <= kSharedLimit);
  INFLLM_TRY(
      to_status("attend", cudaMemsetAsync(taken, 0, plan.chunks * sizeof(unsigned), stream)));
  for (std::int64_t i = 0; i < plan.chunks; ++i) {
    const auto first = static_cast<std::int32_t>(i * plan.chunk);
    const auto count = static_cast<std::int32_t>(std::min(plan.chunk, plan.tiles - first));
    if (C::kSparse) launch_union(params, plan.tile_tokens, first, count, lists, stream);
    AttendArgs args{.batch = params.batch,
                    .pool = pool,
                    .lists = lists,
                    .o = params.o,
                    .lse = static_cast<float*>(params.lse),
                    .c = exponent_of(params.scale),
                    .heads = plan.heads,
                    .group_log2 = std::countr_zero(static_cast<unsigned>(plan.group)),
                    .tile_tokens = plan.tile_tokens,
                    .first = first,
                    .count = count,
                    .next = taken + i};
    if (params.selection == nullptr) args.batch.any_sparse = false;
    INFLLM_TRY(start("attend", attend_kernel<C>, std::min(count, sm_count), C::kThreads, kShared,
                     stream, q_map, k_map, v_map, args));
  }
  return {};
}

}  // namespace infllm::cuda::sm90
