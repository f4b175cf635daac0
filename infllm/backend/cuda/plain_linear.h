// SPDX-License-Identifier: Apache-2.0
//
// What linear.cc needs besides cuBLASLt.
#pragma once

#include "infllm/backend/cuda/blas.h"
#include "infllm/backend/cuda/device.h"

namespace infllm::cuda {

// Any shape, at no speed: sizes that are no multiple of anything.
Status plain_product(const Device& device, const Product& product);

// Elements of f32, bf16 or f16 as `to`, bf16 or f16, rounded to the nearest. Rows of `width`
// elements are spread `stride` apart, with zeros between.
Status convert(const Device& device, DType from, const void* values, DType to, std::int64_t rows,
               std::int64_t width, std::int64_t stride, void* out);

}  // namespace infllm::cuda
