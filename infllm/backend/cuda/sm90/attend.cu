// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/sm90/attend.h"
#include "infllm/backend/cuda/sm90/attend_launch.cuh"

namespace infllm::cuda::sm90 {
namespace {

using BF16Bits = __nv_bfloat16;

template <typename T, int kDim>
using Dense = AttendConfig<T, kDim, 3, false, 0, std::uint16_t>;
// Groups of 16: a warp is a token.
template <typename T, int kDim>
using SparseToken = AttendConfig<T, kDim, 3, true, 16, std::uint16_t>;
// Other groups: up to 64 tokens a tile.
template <typename T, int kDim>
using SparseRows = AttendConfig<T, kDim, 2, true, 0, unsigned long long>;

// Calls work.template operator()<C>() for each configuration that the call needs.
template <typename T, int kDim, class Work>
void for_each_config(const AttendParams& p, Work&& work) {
  const bool sparse = p.selection != nullptr && p.batch.any_sparse;
  if (sparse && p.heads_q == 16 * p.pages.layout.kv_heads) {
    work.template operator()<SparseToken<T, kDim>>();
  } else if (sparse) {
    work.template operator()<SparseRows<T, kDim>>();
  }
  work.template operator()<Dense<T, kDim>>();
}

template <class Work>
void for_each_config(const AttendParams& p, Work&& work) {
  const bool wide = p.pages.layout.head_dim == 128;
  if (p.pages.layout.dtype == DType::kBF16) {
    wide ? for_each_config<BF16Bits, 128>(p, work) : for_each_config<BF16Bits, 64>(p, work);
  } else {
    wide ? for_each_config<__half, 128>(p, work) : for_each_config<__half, 64>(p, work);
  }
}

}  // namespace

bool attends(const AttendParams& p) {
  const std::int32_t heads = p.pages.layout.kv_heads;
  const std::int32_t dim = p.pages.layout.head_dim;
  if (heads < 1 || p.heads_q % heads != 0) return false;
  const auto group = static_cast<unsigned>(p.heads_q / heads);
  const bool sparse = p.selection != nullptr && p.batch.any_sparse;
  const bool fits = sparse ? group >= 2 && group <= 32 : group >= 1 && group <= 64;
  return std::has_single_bit(group) && fits && (dim == 64 || dim == 128) &&
         p.pages.layout.config.block_size == kPageTokens &&
         (p.pages.layout.dtype == DType::kBF16 || p.pages.layout.dtype == DType::kF16);
}

Status attend(const Backend& backend, const AttendParams& params, std::span<std::byte> workspace) {
  const Device& device = device_of(backend);
  Status status;
  for_each_config(params, [&]<class C>() {
    if (status.ok()) status = run_attend<C>(params, workspace, device.stream, device.sm_count);
  });
  return status;
}

std::size_t attend_bytes(const Backend&, const AttendParams& params) {
  std::size_t bytes = 0;
  for_each_config(params, [&]<class C>() { bytes = std::max(bytes, attend_bytes_of<C>(params)); });
  return bytes;
}

}  // namespace infllm::cuda::sm90
