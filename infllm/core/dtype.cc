// SPDX-License-Identifier: Apache-2.0
#include "infllm/core/dtype.h"

namespace infllm {

F16::F16(float value) {
  const auto word = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((word >> 16) & 0x8000u);
  const std::uint32_t magnitude = word & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {  // NaN
    bits = sign | 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65520 or more: infinity
    bits = sign | 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal
    const std::uint32_t rebased = magnitude - (112u << 23);
    bits = static_cast<std::uint16_t>(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13));
  } else {  // subnormal: adding 0.5 aligns the mantissa so that the hardware rounds for us
    const float aligned = std::bit_cast<float>(magnitude) + 0.5f;
    bits = static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(aligned) - 0x3f000000u));
  }
}

F16::operator float() const {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t rest = static_cast<std::uint32_t>(bits & 0x7fffu) << 13;
  if ((bits & 0x7c00u) == 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | rest);
  // Scaling by 2^112 re-biases normals and normalises subnormals in one exact multiplication.
  return std::bit_cast<float>(sign | rest) * 0x1p112f;
}

}  // namespace infllm
