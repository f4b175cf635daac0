// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include "infllm/backend/cuda/heads.h"
#include "infllm/backend/cuda/page.cuh"
#include "infllm/backend/cuda/rows.h"

namespace infllm::cuda {

Status check_layout(const KvLayout& layout, DType activation) {
  const SparseConfig& c = layout.config;
  if (c.block_size != kPageTokens || c.kernel_stride != kFineStride ||
      c.kernel_size != kFineTokens) {
    return unsupported(fmt::format(
        "cuda: block_size, kernel_size, kernel_stride = {}, {}, {}, but this device has {}, {}, "
        "{}; the cpu device takes others",
        c.block_size, c.kernel_size, c.kernel_stride, kPageTokens, kFineTokens, kFineStride));
  }
  if (layout.dtype != activation) {
    return unsupported(fmt::format("cuda: a cache of type {}, but this device keeps {}{}",
                                   name_of(layout.dtype), name_of(activation),
                                   layout.dtype == DType::kF16    ? "; open it as \"cuda:f16\""
                                   : layout.dtype == DType::kBF16 ? "; open it without \":f16\""
                                                                  : ""));
  }
  if (layout.head_dim != 64 && layout.head_dim != 128) {
    return unsupported(
        fmt::format("cuda: head dimension {}, but this device takes 64 and 128; the cpu device "
                    "takes multiples of 16 up to 256",
                    layout.head_dim));
  }
  return {};
}

Status check_heads(std::string_view step, const KvLayout& layout, std::int32_t heads_q,
                   std::int32_t most) {
  INFLLM_TRY(check_layout(layout, layout.dtype == DType::kF16 ? DType::kF16 : DType::kBF16));
  const std::int32_t group = heads_q / layout.kv_heads;
  if (group <= most) return {};
  return unsupported(
      fmt::format("{}: {} query heads share a KV head, but this device takes up to {}; the cpu "
                  "device takes any number",
                  step, group, most));
}

std::int64_t kv_page_bytes(const KvLayout& layout) { return PageMap(layout).bytes(); }

}  // namespace infllm::cuda
