// SPDX-License-Identifier: Apache-2.0
//
// Host side of attend_kernel.cuh, and of the dQ pass, which cuts a call the same way: workspace,
// chunks of tiles, configurations.
#pragma once

#include <algorithm>
#include <bit>

#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/shapes.cuh"
#include "infllm/backend/cuda/sm90/attend_kernel.cuh"
#include "infllm/backend/cuda/sm90/tensor_maps.h"
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
    lists.warp_tokens = C::kSingles ? 16 / group : 0;
  }

  // Of a warpgroup's 64 rows.
  std::uint32_t rows_tokens() const { return static_cast<std::uint32_t>(64 / group); }

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

// Workspace of one configuration.
template <class C>
std::size_t attend_bytes_of(const AttendParams& params) {
  const AttendPlan<C> plan(params);
  ArenaSize size;
  unsigned* taken = nullptr;
  UnionLists lists;
  plan.take([&]<typename T>(T*&, std::int64_t count) { size.take<T>(count); }, taken, lists);
  return size.bytes();
}

// Builds the lists of some tiles at a time and calls launch(args, thread blocks) for each of these
// chunks, with the arguments of the forward pass.
template <class C, class Launch>
Status for_each_chunk(std::string_view step, const AttendParams& params, const AttendPlan<C>& plan,
                      std::span<std::byte> workspace, cudaStream_t stream, int sm_count,
                      Launch&& launch) {
  Arena arena(workspace);
  unsigned* taken = nullptr;
  UnionLists lists;
  plan.take([&]<typename T>(T*& array, std::int64_t count) { array = arena.take<T>(count); }, taken,
            lists);
  INFLLM_TRY(to_status(step, cudaMemsetAsync(taken, 0, plan.chunks * sizeof(unsigned), stream)));
  for (std::int64_t i = 0; i < plan.chunks; ++i) {
    const auto first = static_cast<std::int32_t>(i * plan.chunk);
    const auto count = static_cast<std::int32_t>(std::min(plan.chunk, plan.tiles - first));
    if (C::kSparse) launch_union(params, plan.tile_tokens, first, count, lists, stream);
    AttendArgs args{.batch = params.batch,
                    .pool = PagePool(params.pages),
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
    INFLLM_TRY(launch(args, static_cast<unsigned>(std::min(count, sm_count))));
  }
  return {};
}

template <class C>
Status run_attend(const AttendParams& params, std::span<std::byte> workspace, cudaStream_t stream,
                  int sm_count) {
  const AttendPlan<C> plan(params);
  const PageMap planes(params.pages.layout);
  const AttendMaps maps{
      .q = INFLLM_TRY(rows_map(params, params.q, plan.rows_tokens(), C::kPanels)),
      .k = INFLLM_TRY(plane_map(params.pages, planes.key(0), C::kBlocks == 1 ? C::kPanels : 1)),
      .v = INFLLM_TRY(plane_map(params.pages, planes.value(0), C::kPanels))};
  return for_each_chunk<C>("attend", params, plan, workspace, stream, sm_count,
                           [&](const AttendArgs& args, unsigned blocks) {
                             return start("attend", attend_kernel<C>, blocks, C::kThreads,
                                          shared_bytes<AttendShared<C>>(), stream, maps, args);
                           });
}

// Calls work.template operator()<C>() for each configuration C of a family that a call needs: that
// of its sparse sequences, of which groups of 16 have one of their own, and that of the dense ones.
template <template <typename, int, bool, int> class Config, class Work>
Status for_each_config(const AttendParams& p, Work&& work) {
  return with_shape(p.pages.layout, [&]<typename T, int kDim>() -> Status {
    if (is_sparse(p) && p.heads_q == 16 * p.pages.layout.kv_heads) {
      INFLLM_TRY(work.template operator()<Config<T, kDim, true, 16>>());
    } else if (is_sparse(p)) {
      INFLLM_TRY(work.template operator()<Config<T, kDim, true, 0>>());
    }
    return work.template operator()<Config<T, kDim, false, 0>>();
  });
}

// Workspace of a family: configurations run one after another.
template <template <typename, int, bool, int> class Config>
std::size_t attend_bytes_of(const AttendParams& params) {
  std::size_t bytes = 0;
  const Status status = for_each_config<Config>(params, [&]<class C>() {
    bytes = std::max(bytes, attend_bytes_of<C>(params));
    return Status();
  });
  return status.ok() ? bytes : 0;
}

}  // namespace infllm::cuda::sm90
