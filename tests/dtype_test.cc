// SPDX-License-Identifier: Apache-2.0
#include "infllm/core/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "infllm/core/tensor.h"

namespace infllm {
namespace {

// A 16-bit float's value from its definition: sign, exponent, mantissa.
double value_of(std::uint16_t bits, int mantissa_bits, int bias) {
  const int exponent_bits = 15 - mantissa_bits;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
  const double fraction = std::ldexp(mantissa, -mantissa_bits);
  return exponent == 0 ? sign * std::ldexp(fraction, 1 - bias)
                       : sign * std::ldexp(1 + fraction, exponent - bias);
}

template <typename T>
T from_bits(std::uint32_t bits) {
  T value;
  value.bits = static_cast<std::uint16_t>(bits);
  return value;
}

template <typename T>
void check_all(int mantissa_bits, int bias) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T value = from_bits<T>(bits);
    const auto wide = static_cast<float>(value);
    const double want = value_of(value.bits, mantissa_bits, bias);
    if (std::isnan(want)) {
      ASSERT_TRUE(std::isnan(wide)) << bits;
      ASSERT_TRUE(std::isnan(static_cast<float>(T(wide)))) << bits;
      continue;
    }
    ASSERT_EQ(static_cast<double>(wide), want) << bits;
    ASSERT_EQ(std::signbit(wide), (bits & 0x8000) != 0) << bits;
    ASSERT_EQ(T(wide).bits, value.bits) << bits;  // there and back

    // Half way to the next number goes to the even one, a little beside it to the nearer one.
    if (!std::isfinite(want) || (bits & 0x7fff) + 1 == (T(INFINITY).bits & 0x7fffu)) continue;
    const T next = from_bits<T>(bits + 1);
    if (bits == 0x7fff || bits == 0xffff || !std::isfinite(static_cast<float>(next))) continue;
    const double half = (want + static_cast<double>(static_cast<float>(next))) / 2;
    const auto middle = static_cast<float>(half);
    if (static_cast<double>(middle) != half) continue;  // float has no number there
    const T even = bits % 2 == 0 ? value : next;
    ASSERT_EQ(T(middle).bits, even.bits) << bits;
    ASSERT_EQ(T(std::nextafterf(middle, wide)).bits, value.bits) << bits;
    ASSERT_EQ(T(std::nextafterf(middle, static_cast<float>(next))).bits, next.bits) << bits;
  }
}

TEST(DTypeTest, EveryBF16IsItsDefinitionAndRoundsToNearestEven) { check_all<BF16>(7, 127); }
TEST(DTypeTest, EveryF16IsItsDefinitionAndRoundsToNearestEven) { check_all<F16>(10, 15); }

TEST(DTypeTest, WhatIsTooLargeBecomesInfinite) {
  EXPECT_EQ(static_cast<float>(F16(65519.0f)), 65504.0f);
  EXPECT_EQ(static_cast<float>(F16(65520.0f)), INFINITY);
  EXPECT_EQ(static_cast<float>(F16(-1e30f)), -INFINITY);
  EXPECT_EQ(static_cast<float>(BF16(std::numeric_limits<float>::max())), INFINITY);
  EXPECT_EQ(static_cast<float>(F16(1e-30f)), 0.0f);
}

TEST(DTypeTest, NamesAndSizes) {
  EXPECT_EQ(name_of(DType::kBF16), "bf16");
  EXPECT_EQ(name_of(DType::kBool), "bool");
  EXPECT_EQ(size_of(DType::kF64), 8);
  EXPECT_EQ(size_of(DType::kF16), 2);
  EXPECT_EQ(size_of(DType::kU8), 1);
}

TEST(TensorTest, ReadsUnalignedElementsOfEveryFloatType) {
  const auto expect = [](auto element, DType dtype) {
    std::byte memory[1 + 3 * sizeof(element)];
    const decltype(element) values[3] = {decltype(element)(1.5f), element,
                                         decltype(element)(-2.0f)};
    std::memcpy(memory + 1, values, sizeof(values));
    double wide[2];
    read_elements(TensorView::vector(memory + 1, dtype, 3), 1, 2, wide);
    EXPECT_EQ(wide[0], 0.375);
    EXPECT_EQ(wide[1], -2);
    float narrow[2];
    read_elements(TensorView::vector(memory + 1, dtype, 3), 0, 2, narrow);
    EXPECT_EQ(narrow[0], 1.5f);
    EXPECT_EQ(narrow[1], 0.375f);
  };
  expect(0.375, DType::kF64);
  expect(0.375f, DType::kF32);
  expect(BF16(0.375f), DType::kBF16);
  expect(F16(0.375f), DType::kF16);
  EXPECT_EQ(shape_string(TensorView::matrix(nullptr, DType::kF32, 2, 128)), "[2, 128]");
}

}  // namespace
}  // namespace infllm
