// SPDX-License-Identifier: Apache-2.0
#include <bit>

#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/backend/cuda/sm90/attend_backward_keys.cuh"
#include "infllm/backend/cuda/sm90/attend_launch.cuh"

namespace infllm::cuda::sm90 {
namespace {

// The arrays of the workspace, through an Arena or an ArenaSize.
template <class Taker>
void take(const AttendParams& forward, Choosers& choosers, Taker&& taker, float*& sums) {
  backward::take(forward, choosers, taker);
  taker(sums,
        std::int64_t{choosers.part_capacity} * 2 * kPageTokens * forward.pages.layout.head_dim);
}

template <class C>
Status launch(const Device& device, const AttendBackwardParams& p, const ListedArgs& args) {
  const AttendParams& forward = p.forward;
  const std::uint32_t tokens = 64u >> args.keys.group_log2;
  const CUtensorMap maps[] = {
      INFLLM_TRY(rows_map(forward, forward.q, 1, 1)),
      INFLLM_TRY(rows_map(forward, forward.q, tokens, 1)),
      INFLLM_TRY(rows_map(forward, p.grad_o, 1, 1)),
      INFLLM_TRY(rows_map(forward, p.grad_o, tokens, 1)),
      INFLLM_TRY(plane_map(forward.pages, args.keys.pool.map.key(0), C::kPanels)),
      INFLLM_TRY(plane_map(forward.pages, args.keys.pool.map.value(0), C::kPanels))};
  constexpr std::size_t kShared = sizeof(KeyShared<C>) + 1024;
  static_assert(kShared <= kSharedLimit);
  constexpr auto kernel = key_gradient_kernel<C>;
  INFLLM_TRY(to_status(
      "attend_backward",
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)));
  const auto blocks = static_cast<unsigned>(args.choosers.num_blocks);
  kernel<<<blocks + args.choosers.part_capacity, C::kThreads, kShared, device.stream>>>(
      maps[0], maps[1], maps[2], maps[3], maps[4], maps[5], args);
  INFLLM_TRY(launched("attend_backward"));
  if (args.choosers.part_capacity == 0) return {};
  add_parts_kernel<C><<<dim3(blocks, 2), 128, 0, device.stream>>>(args);
  return launched("attend_backward");
}

}  // namespace

Status key_gradient(const Backend& backend, const AttendBackwardParams& params,
                    const RowStatistics* stats, std::span<std::byte> workspace) {
  constexpr double kLog2E = 1.4426950408889634;
  const Device& device = device_of(backend);
  const AttendParams& forward = params.forward;
  const KvLayout& layout = forward.pages.layout;
  ListedArgs args{.keys = {.batch = forward.batch,
                           .pool = PagePool(forward.pages),
                           .stats = stats,
                           .grad_k = params.grad_k,
                           .grad_v = params.grad_v,
                           .sums = nullptr,
                           .scale = forward.scale,
                           .c = static_cast<float>(forward.scale * kLog2E),
                           .heads = layout.kv_heads,
                           .group_log2 = std::countr_zero(
                               static_cast<unsigned>(forward.heads_q / layout.kv_heads))},
                  .choosers = backward::choosers(forward)};
  if (forward.selection == nullptr) args.keys.batch.any_sparse = false;
  Arena arena(workspace);
  take(
      forward, args.choosers,
      [&]<typename T>(T*& array, std::int64_t count) { array = arena.take<T>(count); },
      args.keys.sums);
  INFLLM_TRY(backward::build_choosers(backend, forward, args.choosers));
  return with_type(layout.dtype, [&](auto zero) {
    using T = decltype(zero);
    return layout.head_dim == 128 ? launch<KeyConfig<T, 128, true>>(device, params, args)
                                  : launch<KeyConfig<T, 64, true>>(device, params, args);
  });
}

std::size_t key_gradient_bytes(const AttendBackwardParams& params) {
  Choosers choosers = backward::choosers(params.forward);
  ArenaSize size;
  float* sums = nullptr;
  take(
      params.forward, choosers, [&]<typename T>(T*&, std::int64_t count) { size.take<T>(count); },
      sums);
  return size.bytes();
}

}  // namespace infllm::cuda::sm90
