// SPDX-License-Identifier: Apache-2.0
#include "infllm/core/tensor.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstring>

#include "infllm/core/status.h"

namespace infllm {
namespace {

template <typename From, typename To>
void convert(const std::byte* from, std::int64_t count, To* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    From value;  // files do not align their tensors
    std::memcpy(&value, from + i * static_cast<std::int64_t>(sizeof(From)), sizeof(From));
    if constexpr (std::is_arithmetic_v<From>) {
      out[i] = static_cast<To>(value);
    } else {
      out[i] = static_cast<To>(static_cast<float>(value));
    }
  }
}

template <typename To>
void read(const TensorView& tensor, std::int64_t first, std::int64_t count, To* out) {
  const auto* from = static_cast<const std::byte*>(tensor.data) + first * size_of(tensor.dtype);
  switch (tensor.dtype) {
    case DType::kF64:
      return convert<double>(from, count, out);
    case DType::kF32:
      return convert<float>(from, count, out);
    case DType::kBF16:
      return convert<BF16>(from, count, out);
    case DType::kF16:
      return convert<F16>(from, count, out);
    default:
      INFLLM_CHECK(false, "not a floating-point tensor");
  }
}

}  // namespace

void read_elements(const TensorView& tensor, std::int64_t first, std::int64_t count, float* out) {
  read(tensor, first, count, out);
}

void read_elements(const TensorView& tensor, std::int64_t first, std::int64_t count, double* out) {
  read(tensor, first, count, out);
}

std::string shape_string(const TensorView& tensor) {
  return fmt::format("[{}]",
                     fmt::join(tensor.shape.begin(), tensor.shape.begin() + tensor.rank, ", "));
}

}  // namespace infllm
