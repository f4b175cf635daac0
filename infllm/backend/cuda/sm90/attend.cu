// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/sm90/attend.h"
#include "infllm/backend/cuda/sm90/attend_launch.cuh"
#include "infllm/backend/cuda/sm90/attend_shapes.h"

namespace infllm::cuda::sm90 {
namespace {

// Calls work.template operator()<C>() for each configuration that the call needs.
template <typename T, int kDim, class Work>
Status for_each_config(const AttendParams& p, Work&& work) {
  const bool sparse = is_sparse(p);
  if (sparse && p.heads_q == 16 * p.pages.layout.kv_heads) {
    INFLLM_TRY(work.template operator()<TokenConfig<T, kDim>>());
  } else if (sparse) {
    INFLLM_TRY(work.template operator()<RowConfig<T, kDim>>());
  }
  return work.template operator()<DenseConfig<T, kDim>>();
}

template <class Work>
Status for_each_config(const AttendParams& p, Work&& work) {
  return with_shape(p.pages.layout,
                    [&]<typename T, int kDim>() { return for_each_config<T, kDim>(p, work); });
}

}  // namespace

bool attends(const AttendParams& p) { return is_sparse(p) ? covers(p, 4, 32) : covers(p, 1, 64); }

Status attend(const Backend& backend, const AttendParams& params, std::span<std::byte> workspace) {
  const Device& device = device_of(backend);
  return for_each_config(params, [&]<class C>() {
    return run_attend<C>(params, workspace, device.stream, device.sm_count);
  });
}

std::size_t attend_bytes(const Backend&, const AttendParams& params) {
  std::size_t bytes = 0;
  const Status status = for_each_config(params, [&]<class C>() {
    bytes = std::max(bytes, attend_bytes_of<C>(params));
    return Status();
  });
  return status.ok() ? bytes : 0;
}

}  // namespace infllm::cuda::sm90
