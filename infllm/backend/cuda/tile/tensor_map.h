// SPDX-License-Identifier: Apache-2.0
//
// Tensor maps: what the copy engine must know of an array in global memory. Made on the host, used
// as a __grid_constant__ kernel parameter (tma.cuh).
//
//   CUtensorMap map = INFLLM_TRY(make_tensor_map({.data = keys, .dtype = DType::kBF16,
//       .rank = 2, .size = {128, rows}, .stride_bytes = {256}, .box = {64, 64}}));
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>

#include "infllm/core/dtype.h"
#include "infllm/core/status.h"

namespace infllm::cuda::tile {

struct TensorMapSpec {
  const void* data = nullptr;                   // 16-byte aligned
  DType dtype = DType::kBF16;                   // kBF16, kF16 or kF32
  int rank = 0;                                 // 1 to 5
  std::array<std::uint64_t, 5> size{};          // elements, the innermost dimension first
  std::array<std::uint64_t, 4> stride_bytes{};  // of dimensions 1 ..; multiples of 16
  std::array<std::uint32_t, 5> box{};           // elements; the innermost at most 128 bytes
  bool swizzle = true;  // 128-byte swizzle: the 16-byte units of row r are permuted by r % 8
};

// kUnsupported when the driver has no tensor maps, kInvalidArgument with the numbers when it
// refuses them.
Result<CUtensorMap> make_tensor_map(const TensorMapSpec& spec);

}  // namespace infllm::cuda::tile
