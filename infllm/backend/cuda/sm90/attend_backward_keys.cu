// SPDX-License-Identifier: Apache-2.0
#include <bit>
#include <climits>

#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/backend/cuda/sm90/attend_backward_keys.cuh"
#include "infllm/backend/cuda/sm90/attend_launch.cuh"

namespace infllm::cuda::sm90 {
namespace {

constexpr std::int64_t kRounds = 4;  // parts of a dense pass, for each multiprocessor
constexpr std::int64_t kLeastPartTokens = 512;

bool is_listed(const AttendParams& forward) {
  return forward.selection != nullptr && forward.batch.any_sparse;
}

// How a call is cut into thread blocks.
struct KeyPlan {
  KeyPlan(const AttendParams& forward, int sm_count)
      : blocks_of_each(is_listed(forward) ? 1 : 2),
        sum_floats(std::int64_t{2} * blocks_of_each * kPageTokens * forward.pages.layout.head_dim) {
    const Batch& batch = forward.batch;
    if (is_listed(forward)) {
      choosers = backward::choosers(forward);
      parts = choosers.part_capacity;
      thread_blocks = parts + choosers.num_blocks;
      blocks = choosers.num_blocks;
      return;
    }
    const std::int64_t pairs = ceil_div(batch.max_kv_length, 2 * kPageTokens) *
                               (std::int64_t{forward.pages.layout.kv_heads} * batch.num_sequences);
    const std::int64_t most = ceil_div(batch.max_query_length, kLeastPartTokens);
    num_parts = std::clamp<std::int64_t>(ceil_div(kRounds * sm_count, pairs), 1, most);
    if (num_parts > 1) part_tokens = ceil_div(batch.max_query_length, num_parts);
    thread_blocks = pairs * num_parts;
    parts = num_parts > 1 ? thread_blocks : 0;
    blocks = 2 * pairs;
  }

  template <class Taker>
  void take(const AttendParams& forward, Taker&& taker, float*& sums) {
    if (is_listed(forward)) backward::take(forward, choosers, taker);
    taker(sums, parts * sum_floats);
  }

  std::int64_t blocks_of_each;  // thread block
  std::int64_t sum_floats;      // of a part
  Choosers choosers;            // sparse
  std::int64_t num_parts = 1;   // dense
  std::int64_t part_tokens = INT_MAX;
  std::int64_t thread_blocks = 0;
  std::int64_t parts = 0;   // with sums of their own
  std::int64_t blocks = 0;  // of 64 keys
};

template <class C>
Status launch(const Device& device, const AttendBackwardParams& p, const KeyPlan& plan,
              const KeyGradientArgs& args) {
  const AttendParams& forward = p.forward;
  const std::uint32_t tokens = 64u >> args.group_log2;
  const CUtensorMap maps[] = {
      INFLLM_TRY(rows_map(forward, forward.q, 1, 1)),
      INFLLM_TRY(rows_map(forward, forward.q, tokens, 1)),
      INFLLM_TRY(rows_map(forward, p.grad_o, 1, 1)),
      INFLLM_TRY(rows_map(forward, p.grad_o, tokens, 1)),
      INFLLM_TRY(plane_map(forward.pages, args.pool.map.key(0), C::kPanels)),
      INFLLM_TRY(plane_map(forward.pages, args.pool.map.value(0), C::kPanels))};
  constexpr std::size_t kShared = sizeof(KeyShared<C>) + 1024;
  static_assert(kShared <= kSharedLimit);
  constexpr auto kernel = key_gradient_kernel<C>;
  INFLLM_TRY(to_status(
      "attend_backward",
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)));
  kernel<<<static_cast<unsigned>(plan.thread_blocks), C::kThreads, kShared, device.stream>>>(
      maps[0], maps[1], maps[2], maps[3], maps[4], maps[5], args);
  INFLLM_TRY(launched("attend_backward"));
  if (plan.parts == 0) return {};
  add_parts_kernel<C><<<dim3(static_cast<unsigned>(plan.blocks), 2), 128, 0, device.stream>>>(args);
  return launched("attend_backward");
}

}  // namespace

Status key_gradient(const Backend& backend, const AttendBackwardParams& params,
                    const RowStatistics* stats, std::span<std::byte> workspace) {
  constexpr double kLog2E = 1.4426950408889634;
  const Device& device = device_of(backend);
  const AttendParams& forward = params.forward;
  const KvLayout& layout = forward.pages.layout;
  KeyPlan plan(forward, device.sm_count);
  Arena arena(workspace);
  float* sums = nullptr;
  plan.take(
      forward, [&]<typename T>(T*& array, std::int64_t count) { array = arena.take<T>(count); },
      sums);
  const bool listed = is_listed(forward);
  if (listed) INFLLM_TRY(backward::build_choosers(backend, forward, plan.choosers));
  KeyGradientArgs args{
      .batch = forward.batch,
      .pool = PagePool(forward.pages),
      .choosers = plan.choosers,
      .stats = stats,
      .grad_k = params.grad_k,
      .grad_v = params.grad_v,
      .sums = sums,
      .scale = forward.scale,
      .c = static_cast<float>(forward.scale * kLog2E),
      .heads = layout.kv_heads,
      .group_log2 = std::countr_zero(static_cast<unsigned>(forward.heads_q / layout.kv_heads)),
      .num_parts = static_cast<std::int32_t>(plan.num_parts),
      .part_tokens = static_cast<std::int32_t>(plan.part_tokens)};
  if (!listed) args.batch.any_sparse = false;
  return with_type(layout.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (layout.head_dim == 128) {
      return listed ? launch<KeyConfig<T, 128, true>>(device, params, plan, args)
                    : launch<KeyConfig<T, 128, false>>(device, params, plan, args);
    }
    return listed ? launch<KeyConfig<T, 64, true>>(device, params, plan, args)
                  : launch<KeyConfig<T, 64, false>>(device, params, plan, args);
  });
}

std::size_t key_gradient_bytes(const Backend& backend, const AttendBackwardParams& params) {
  KeyPlan plan(params.forward, device_of(backend).sm_count);
  ArenaSize size;
  float* sums = nullptr;
  plan.take(
      params.forward, [&]<typename T>(T*&, std::int64_t count) { size.take<T>(count); }, sums);
  return size.bytes();
}

}  // namespace infllm::cuda::sm90
