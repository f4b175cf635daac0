// SPDX-License-Identifier: Apache-2.0
//
// Element types, and the two 16-bit floats as host structs with round-to-nearest-even conversions.
#pragma once

#include <bit>
#include <cstdint>
#include <string_view>

namespace infllm {

enum class DType : std::uint8_t { kF64, kF32, kBF16, kF16, kI8, kU8, kI32, kI64, kBool };

constexpr std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kF64:
    case DType::kI64:
      return 8;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kI8:
    case DType::kU8:
    case DType::kBool:
      return 1;
  }
  return 0;
}

// "f64", "bf16", ...: the spelling in messages and on the command line.
constexpr std::string_view name_of(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return "f64";
    case DType::kF32:
      return "f32";
    case DType::kBF16:
      return "bf16";
    case DType::kF16:
      return "f16";
    case DType::kI8:
      return "i8";
    case DType::kU8:
      return "u8";
    case DType::kI32:
      return "i32";
    case DType::kI64:
      return "i64";
    case DType::kBool:
      return "bool";
  }
  return "?";
}

// bfloat16: the upper half of a float. NaN stays NaN (quiet).
struct BF16 {
  std::uint16_t bits = 0;

  BF16() = default;
  explicit BF16(float value) {
    const auto word = std::bit_cast<std::uint32_t>(value);
    const bool is_nan = (word & 0x7fffffffu) > 0x7f800000u;
    bits = is_nan ? static_cast<std::uint16_t>((word >> 16) | 0x40u)
                  : static_cast<std::uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
  }
  explicit operator float() const {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
};

// IEEE binary16.
struct F16 {
  std::uint16_t bits = 0;

  F16() = default;
  explicit F16(float value);
  explicit operator float() const;
};

// The nearest bf16 / f16 value, as the wider type: how the float64 reference rounds where an honest
// kernel rounds. The detour over float is exact enough to be the nearest-even result because float
// keeps 24 bits; a double that lies within 2^-24 of a tie may differ by the double rounding.
inline double round_to_bf16(double value) {
  return static_cast<double>(static_cast<float>(BF16(static_cast<float>(value))));
}

}  // namespace infllm
