// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/shapes.cuh"
#include "infllm/backend/cuda/sm90/attend_backward_keys.cuh"
#include "infllm/backend/cuda/sm90/attend_backward_launch.cuh"

namespace infllm::cuda::sm90 {
namespace {

// The arrays of the workspace, through an Arena or an ArenaSize.
template <class Taker>
void take(const AttendParams& forward, Choosers& choosers, Taker&& taker, float*& sums) {
  backward::take(forward, choosers, taker);
  taker(sums, backward::part_floats(forward, choosers));
}

template <class C>
Status launch(const Device& device, const AttendBackwardParams& p, const ListedArgs& args) {
  const KeyMaps maps = INFLLM_TRY(key_maps<C>(p, args.keys));
  const auto blocks = static_cast<unsigned>(args.choosers.num_blocks);
  INFLLM_TRY((start_keys<C, KeyShared<C>>(key_gradient_kernel<C>,
                                          args.choosers.num_blocks + args.choosers.part_capacity,
                                          device.stream, maps, args)));
  if (args.choosers.part_capacity == 0) return {};
  add_parts_kernel<C><<<dim3(blocks, 2), 128, 0, device.stream>>>(args);
  return launched("attend_backward");
}

}  // namespace

Status key_gradient(const Backend& backend, const AttendBackwardParams& params,
                    const RowStatistics* stats, std::span<std::byte> workspace) {
  const Device& device = device_of(backend);
  const AttendParams& forward = params.forward;
  ListedArgs args{.keys = key_args(params, stats), .choosers = backward::choosers(forward)};
  if (forward.selection == nullptr) args.keys.batch.any_sparse = false;
  Arena arena(workspace);
  take(
      forward, args.choosers,
      [&]<typename T>(T*& array, std::int64_t count) { array = arena.take<T>(count); },
      args.keys.sums);
  INFLLM_TRY(backward::build_choosers(backend, forward, args.choosers));
  return with_shape(forward.pages.layout, [&]<typename T, int kDim>() {
    return launch<KeyConfig<T, kDim, true>>(device, params, args);
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
