// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/sm90/attend_backward_queries.cuh"
#include "infllm/backend/cuda/sm90/attend_launch.cuh"

namespace infllm::cuda::sm90 {
namespace {

template <class C>
Status run(const Device& device, const AttendBackwardParams& params, const RowStatistics* stats,
           std::span<std::byte> workspace) {
  const AttendParams& forward = params.forward;
  const AttendPlan<C> plan(forward);
  const PageMap planes(forward.pages.layout);
  const QueryGradientMaps maps{
      .q = INFLLM_TRY(rows_map(forward, forward.q, plan.rows_tokens(), C::kPanels)),
      .grad_o = INFLLM_TRY(rows_map(forward, params.grad_o, plan.rows_tokens(), C::kPanels)),
      .k = INFLLM_TRY(plane_map(forward.pages, planes.key(0), C::kPanels)),
      .v = INFLLM_TRY(plane_map(forward.pages, planes.value(0), C::kPanels))};
  return for_each_chunk<C>(
      "attend_backward", forward, plan, workspace, device.stream, device.sm_count,
      [&](const AttendArgs& attend, unsigned blocks) {
        QueryGradientArgs args{.attend = attend, .stats = stats, .scale = forward.scale};
        args.attend.o = params.grad_q;
        return start("attend_backward", query_gradient_kernel<C>, blocks, C::kThreads,
                     shared_bytes<QueryGradientShared<C>>(), device.stream, maps, args);
      });
}

}  // namespace

Status query_gradient(const Backend& backend, const AttendBackwardParams& params,
                      const RowStatistics* stats, std::span<std::byte> workspace) {
  return for_each_config<QueryGradientConfig>(params.forward, [&]<class C>() {
    return run<C>(device_of(backend), params, stats, workspace);
  });
}

std::size_t query_gradient_bytes(const AttendBackwardParams& params) {
  return attend_bytes_of<QueryGradientConfig>(params.forward);
}

}  // namespace infllm::cuda::sm90
