// SPDX-License-Identifier: Apache-2.0
//
// Products of a few tokens with a weight matrix: bound by the one pass over the weights.
#pragma once

#include "infllm/backend/cuda/blas.h"
#include "infllm/backend/cuda/device.h"

namespace infllm::cuda {

inline constexpr std::int64_t kGemvTokens = 4;  // the most that one pass serves

// Whether gemv() has the shape: up to kGemvTokens tokens, rows of whole 16-byte units.
bool gemv_covers(const Product& product);
Status gemv(const Device& device, const Product& product);

// Any shape, at no speed: sizes that are no multiple of anything.
Status plain_product(const Device& device, const Product& product);

// count elements of f32, bf16 or f16 as `to`, bf16 or f16, rounded to the nearest. Rows of `width`
// elements are spread `stride` apart, with zeros between.
Status convert(const Device& device, DType from, const void* values, DType to, std::int64_t rows,
               std::int64_t width, std::int64_t stride, void* out);

}  // namespace infllm::cuda
