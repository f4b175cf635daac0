// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/decode/row_part.cuh"
#include "infllm/backend/cuda/decode/select_attend.h"

namespace infllm::cuda::decode {
namespace {

constexpr int kMinParts = 16;  // of a row: with fewer, clusters are as fast or faster
// Leaves multiprocessors to the kernel behind, which prepares itself meanwhile.
constexpr int kMaxParts = kMaxResultParts;
constexpr int kTogether = 8;  // outputs that a warp puts together

// Grid: parts, KV heads, sequences.
template <typename T, int kDim>
__global__ void __launch_bounds__(kStepThreads, 1)
    select_attend_kernel(const __grid_constant__ StepArgs a) {
  extern __shared__ __align__(128) std::byte memory[];
  const auto head_kv = static_cast<int>(blockIdx.y);
  const auto index = static_cast<int>(blockIdx.z);
  Sequence sequence(a.batch, index);
  sequence.length = min(sequence.length, a.batch.max_kv_length);
  RowPart<T, kDim> part(a, sequence, index * a.pool.map.heads + head_kv, head_kv,
                        static_cast<int>(blockIdx.x),
                        *reinterpret_cast<PartShared<T, kDim>*>(memory));
  if (sequence.tokens != 0) {
    part.prepare();
    part.run();
  } else {
    wait_for_previous();
  }
}

StepSizes sizes_of(const Device& device, const SelectAttendParams& p) {
  return {device, p, kTogether, kMaxParts};
}

template <typename T, int kDim>
Status launch_rows(const Device& device, const StepArgs& args) {
  const auto kernel = select_attend_kernel<T, kDim>;
  const std::size_t bytes =
      sizeof(PartShared<T, kDim>) + TopCandidatesShared<kStepThreads>::key_bytes(args.key_stride);
  INFLLM_TRY(to_status("select_attend",
                       cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(bytes))));
  const dim3 grid(static_cast<unsigned>(args.parts), static_cast<unsigned>(args.pool.map.heads),
                  static_cast<unsigned>(args.batch.num_sequences));
  return launch_parts(device, "select_attend", kernel, grid, kStepThreads, bytes, 1, args,
                      /*all_at_once=*/true);
}

}  // namespace

std::size_t exchange_words(int sm_count) { return ExchangeWords(sm_count).end; }

bool select_attends(const Backend& backend, const SelectAttendParams& p) {
  const StepSizes sizes = sizes_of(device_of(backend), p);
  return sizes.parts >= kMinParts && is_whole_step(backend, p, sizes);
}

Status select_attend(const Backend& backend, const SelectAttendParams& p, std::span<std::byte>) {
  const Device& device = device_of(backend);
  const StepArgs args = step_args(device, p, sizes_of(device, p));
  return with_type(p.attend.pages.layout.dtype, [&](auto type) {
    using T = decltype(type);
    return p.attend.pages.layout.head_dim == 128 ? launch_rows<T, 128>(device, args)
                                                 : launch_rows<T, 64>(device, args);
  });
}

}  // namespace infllm::cuda::decode
