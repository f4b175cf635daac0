// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/decode/arrivals.cuh"
#include "infllm/backend/cuda/decode/row_stream.cuh"
#include "infllm/backend/cuda/decode/row_stream.h"
#include "infllm/backend/cuda/tile/tensor_map.h"

namespace infllm::cuda::decode {
namespace {

constexpr int kTogether = 4;  // outputs that a thread puts together

struct Args {
  StepArgs step;
  CUtensorMap planes;
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kStepThreads, 1)
    row_stream_kernel([[maybe_unused]] const __grid_constant__ Args args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<StreamShared<T, kDim>*>(memory);
  const StepArgs& a = args.step;
  const int heads = a.pool.map.heads;
  // The row that it will nearly always be.
  const WarmSequence warm(a.batch, static_cast<int>(blockIdx.x) / a.parts / heads);
  if (threadIdx.x == 32) RowStream<T, kDim>::Stream::set_up(shared.streams);  // beside warp 0
  const int number = take_number(a.arrivals, static_cast<int>(gridDim.x), shared.number);
  warm.wait(shared.list);
  const int row = number / a.parts;
  Sequence sequence(a.batch, row / heads);
  sequence.length = min(sequence.length, a.batch.max_kv_length);
  RowStream<T, kDim> stream(a, &args.planes, sequence, row, row % heads, number % a.parts, shared);
  if (sequence.tokens != 0) stream.prepare();  // beside the end of the kernel before
  wait_for_previous();
  start_next();
  if (sequence.tokens != 0) stream.run();
#endif
}

StepSizes sizes_of(const Device& device, const SelectAttendParams& p) {
  return {device, p, kTogether, kMaxStreamParts};
}

// Of a thread block.
std::size_t shared_bytes(const KvLayout& layout, int key_stride) {
  return (layout.head_dim == 128 ? sizeof(StreamShared<__half, 128>)
                                 : sizeof(StreamShared<__half, 64>)) +
         TopCandidatesShared<kStepThreads>::key_bytes(key_stride);
}

template <typename T, int kDim>
Status launch_rows(const Device& device, const StepSizes& sizes, std::size_t bytes,
                   const Args& args) {
  const auto kernel = row_stream_kernel<T, kDim>;
  INFLLM_TRY(to_status("row_stream",
                       cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(bytes))));
  return launch_parts(device, "row_stream", kernel,
                      dim3(static_cast<unsigned>(sizes.parts * sizes.rows)), kStepThreads, bytes, 1,
                      args);
}

// Slices of 16 tokens of the keys and values of all heads.
Result<CUtensorMap> plane_map(const KvPages& pages) {
  const PagePool pool(pages);
  const auto row_bytes = static_cast<std::uint64_t>(pool.map.row_bytes);
  const auto panels = static_cast<std::uint32_t>(pages.layout.head_dim / 64);
  return tile::make_tensor_map(
      {.data = pool.data,
       .dtype = pages.layout.dtype,
       .rank = 5,
       .size = {64, kPageTokens, panels, 2 * static_cast<std::uint64_t>(pool.map.heads),
                static_cast<std::uint64_t>(pool.num_pages)},
       .stride_bytes = {row_bytes, 128, kPageTokens * row_bytes,
                        static_cast<std::uint64_t>(pool.page_bytes)},
       .box = {64, kSliceTokens, panels, 1, 1}});
}

}  // namespace

bool streams_rows(const Backend& backend, const SelectAttendParams& p) {
  const Device& device = device_of(backend);
  const StepSizes sizes = sizes_of(device, p);
  return is_whole_step(backend, p, sizes) &&
         shared_bytes(p.attend.pages.layout, sizes.key_stride) <= device.shared_bytes;
}

Status stream_rows(const Backend& backend, const SelectAttendParams& p, std::span<std::byte>) {
  const Device& device = device_of(backend);
  const StepSizes sizes = sizes_of(device, p);
  const KvLayout& layout = p.attend.pages.layout;
  const std::size_t bytes = shared_bytes(layout, sizes.key_stride);
  const Args args{.step = step_args(device, p, sizes),
                  .planes = INFLLM_TRY(plane_map(p.attend.pages))};
  return with_type(layout.dtype, [&](auto type) {
    using T = decltype(type);
    return layout.head_dim == 128 ? launch_rows<T, 128>(device, sizes, bytes, args)
                                  : launch_rows<T, 64>(device, sizes, bytes, args);
  });
}

}  // namespace infllm::cuda::decode
