// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/sm90/attend.h"
#include "infllm/backend/cuda/sm90/attend_launch.cuh"

namespace infllm::cuda::sm90 {
namespace {

// Calls work.template operator()<C>() for each configuration that the call needs.
template <typename T, int kDim, class Work>
Status for_each_config(const AttendParams& p, Work&& work) {
  const bool sparse = p.selection != nullptr && p.batch.any_sparse;
  if (sparse && p.heads_q == 16 * p.pages.layout.kv_heads) {
    INFLLM_TRY(work.template operator()<TokenConfig<T, kDim>>());
  } else if (sparse) {
    INFLLM_TRY(work.template operator()<RowConfig<T, kDim>>());
  }
  return work.template operator()<DenseConfig<T, kDim>>();
}

template <class Work>
Status for_each_config(const AttendParams& p, Work&& work) {
  const bool wide = p.pages.layout.head_dim == 128;
  if (p.pages.layout.dtype == DType::kBF16) {
    return wide ? for_each_config<__nv_bfloat16, 128>(p, work)
                : for_each_config<__nv_bfloat16, 64>(p, work);
  }
  return wide ? for_each_config<__half, 128>(p, work) : for_each_config<__half, 64>(p, work);
}

}  // namespace

bool attends(const AttendParams& p) {
  const std::int32_t heads = p.pages.layout.kv_heads;
  const std::int32_t dim = p.pages.layout.head_dim;
  if (heads < 1 || p.heads_q % heads != 0) return false;
  const auto group = static_cast<unsigned>(p.heads_q / heads);
  const bool sparse = p.selection != nullptr && p.batch.any_sparse;
  const bool fits = sparse ? group >= 4 && group <= 32 : group >= 1 && group <= 64;
  return std::has_single_bit(group) && fits && (dim == 64 || dim == 128) &&
         p.pages.layout.config.block_size == kPageTokens &&
         (p.pages.layout.dtype == DType::kBF16 || p.pages.layout.dtype == DType::kF16);
}

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
