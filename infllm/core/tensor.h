// SPDX-License-Identifier: Apache-2.0
//
// A dense row-major array that somebody else owns: pointer, element type, shape.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "infllm/core/dtype.h"

namespace infllm {

struct TensorView {
  static constexpr int kMaxRank = 8;

  const void* data = nullptr;  // need not be aligned to the element size
  DType dtype = DType::kF32;
  int rank = 0;
  std::array<std::int64_t, kMaxRank> shape{};

  std::int64_t elements() const {
    std::int64_t product = 1;
    for (int i = 0; i < rank; ++i) product *= shape[i];
    return product;
  }
  std::int64_t bytes() const { return elements() * size_of(dtype); }

  static TensorView matrix(const void* data, DType dtype, std::int64_t rows, std::int64_t cols) {
    return {data, dtype, 2, {rows, cols}};
  }
  static TensorView vector(const void* data, DType dtype, std::int64_t size) {
    return {data, dtype, 1, {size}};
  }
};

// Elements first .. first + count - 1 of a floating-point tensor (f64, f32, bf16 or f16),
// converted.
void read_elements(const TensorView& tensor, std::int64_t first, std::int64_t count, float* out);
void read_elements(const TensorView& tensor, std::int64_t first, std::int64_t count, double* out);

// "[2, 128]", for messages.
std::string shape_string(const TensorView& tensor);

}  // namespace infllm
