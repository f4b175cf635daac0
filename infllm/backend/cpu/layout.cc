// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cpu/layout.h"

#include <fmt/format.h>

#include "infllm/backend/cpu/page.h"

namespace infllm::cpu {
namespace {

constexpr std::int32_t kDimStep = 16;  // one AVX-512 register of floats
constexpr std::int32_t kMaxHeadDim = 256;

}  // namespace

Status check_layout(const KvLayout& layout) {
  if (layout.config.block_size != kPageTokens) {
    return unsupported(fmt::format(
        "cpu: block_size = {}, but this device has pages of {} tokens; the reference device takes "
        "any",
        layout.config.block_size, kPageTokens));
  }
  if (layout.dtype != DType::kBF16 && layout.dtype != DType::kF32) {
    return unsupported(fmt::format("cpu: a cache of type {}, but this device keeps bf16 or f32",
                                   name_of(layout.dtype)));
  }
  if (layout.head_dim % kDimStep != 0 || layout.head_dim > kMaxHeadDim || layout.head_dim < 1) {
    return unsupported(fmt::format(
        "cpu: head dimension {}, but this device takes multiples of {} up to {}; the reference "
        "device takes any",
        layout.head_dim, kDimStep, kMaxHeadDim));
  }
  return {};
}

std::int64_t page_bytes(const KvLayout& layout) { return PageMap(layout).bytes(); }

}  // namespace infllm::cpu
