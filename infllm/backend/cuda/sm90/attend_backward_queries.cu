// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>

#include "infllm/backend/cuda/shapes.cuh"
#include "infllm/backend/cuda/sm90/attend_backward_queries.cuh"
#include "infllm/backend/cuda/sm90/attend_launch.cuh"

namespace infllm::cuda::sm90 {
namespace {

// The forward pass's plan; all blocks are everybody's.
template <class C, class Taker>
AttendPlan<C> take(const AttendParams& forward, Taker&& taker, unsigned*& taken,
                   UnionLists& lists) {
  const AttendPlan<C> plan(forward);
  plan.take(taker, taken, lists);
  lists.warp_tokens = 0;
  return plan;
}

template <class C>
Status run(const Device& device, const AttendBackwardParams& params, const RowStatistics* stats,
           std::span<std::byte> workspace) {
  const AttendParams& forward = params.forward;
  const cudaStream_t stream = device.stream;
  Arena arena(workspace);
  unsigned* taken = nullptr;
  UnionLists lists;
  const auto plan = take<C>(
      forward, [&]<typename T>(T*& array, std::int64_t count) { array = arena.take<T>(count); },
      taken, lists);
  const PagePool pool(forward.pages);
  const auto tokens = static_cast<std::uint32_t>(64 / plan.group);
  const CUtensorMap maps[] = {INFLLM_TRY(rows_map(forward, forward.q, tokens, C::kPanels)),
                              INFLLM_TRY(rows_map(forward, params.grad_o, tokens, C::kPanels)),
                              INFLLM_TRY(plane_map(forward.pages, pool.map.key(0), C::kPanels)),
                              INFLLM_TRY(plane_map(forward.pages, pool.map.value(0), C::kPanels))};
  constexpr std::size_t kShared = sizeof(QueryGradientShared<C>) + 1024;
  static_assert(kShared <= kSharedLimit);
  INFLLM_TRY(to_status("attend_backward",
                       cudaMemsetAsync(taken, 0, plan.chunks * sizeof(unsigned), stream)));
  for (std::int64_t i = 0; i < plan.chunks; ++i) {
    const auto first = static_cast<std::int32_t>(i * plan.chunk);
    const auto count = static_cast<std::int32_t>(std::min(plan.chunk, plan.tiles - first));
    if (C::kSparse) launch_union(forward, plan.tile_tokens, first, count, lists, stream);
    QueryGradientArgs args{
        .attend = {.batch = forward.batch,
                   .pool = pool,
                   .lists = lists,
                   .o = params.grad_q,
                   .lse = nullptr,
                   .c = exponent_of(forward.scale),
                   .heads = plan.heads,
                   .group_log2 = std::countr_zero(static_cast<unsigned>(plan.group)),
                   .tile_tokens = plan.tile_tokens,
                   .first = first,
                   .count = count,
                   .next = taken + i},
        .stats = stats,
        .scale = forward.scale};
    if (forward.selection == nullptr) args.attend.batch.any_sparse = false;
    INFLLM_TRY(start("attend_backward", query_gradient_kernel<C>, std::min(count, device.sm_count),
                     C::kThreads, kShared, stream, maps[0], maps[1], maps[2], maps[3], args));
  }
  return {};
}

// Calls work.template operator()<C>() for each configuration that the call needs.
template <typename T, int kDim, class Work>
Status for_each_config(const AttendParams& p, Work&& work) {
  const bool sparse = is_sparse(p);
  if (sparse && p.heads_q == 16 * p.pages.layout.kv_heads) {
    INFLLM_TRY(work.template operator()<QueryGradientConfig<T, kDim, true, 16>>());
  } else if (sparse) {
    INFLLM_TRY(work.template operator()<QueryGradientConfig<T, kDim, true, 0>>());
  }
  return work.template operator()<QueryGradientConfig<T, kDim, false, 0>>();
}

template <class Work>
Status for_each_config(const AttendParams& p, Work&& work) {
  return with_shape(p.pages.layout,
                    [&]<typename T, int kDim>() { return for_each_config<T, kDim>(p, work); });
}

}  // namespace

Status query_gradient(const Backend& backend, const AttendBackwardParams& params,
                      const RowStatistics* stats, std::span<std::byte> workspace) {
  const Device& device = device_of(backend);
  return for_each_config(params.forward,
                         [&]<class C>() { return run<C>(device, params, stats, workspace); });
}

std::size_t query_gradient_bytes(const AttendBackwardParams& params) {
  std::size_t bytes = 0;
  const Status status = for_each_config(params.forward, [&]<class C>() {
    ArenaSize size;
    unsigned* taken = nullptr;
    UnionLists lists;
    take<C>(
        params.forward, [&]<typename T>(T*&, std::int64_t count) { size.take<T>(count); }, taken,
        lists);
    bytes = std::max(bytes, size.bytes());
    return Status();
  });
  return status.ok() ? bytes : 0;
}

}  // namespace infllm::cuda::sm90
