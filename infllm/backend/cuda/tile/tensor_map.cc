// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/tile/tensor_map.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <span>

namespace infllm::cuda::tile {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function through the runtime, so that nothing links to libcuda.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Encode>(function);
}

CUtensorMapDataType type_of(DType dtype) {
  if (dtype == DType::kF16) return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (dtype == DType::kF32) return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

}  // namespace

Result<CUtensorMap> make_tensor_map(const TensorMapSpec& spec) {
  static const Encode encode = find_encode();
  if (encode == nullptr) {
    return unsupported("this NVIDIA driver has no tensor maps; expected one for CUDA 12 or newer");
  }
  constexpr std::array<std::uint32_t, 5> kDense = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, type_of(spec.dtype), static_cast<std::uint32_t>(spec.rank),
             const_cast<void*>(spec.data), spec.size.data(), spec.stride_bytes.data(),
             spec.box.data(), kDense.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
             spec.swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    const auto rank = static_cast<std::size_t>(spec.rank);
    return invalid_argument(
        fmt::format("tensor map: the driver refuses (error {}) sizes [{}], strides [{}], box [{}]",
                    static_cast<int>(result), fmt::join(std::span(spec.size).first(rank), ", "),
                    fmt::join(std::span(spec.stride_bytes).first(rank - 1), ", "),
                    fmt::join(std::span(spec.box).first(rank), ", ")));
  }
  return map;
}

}  // namespace infllm::cuda::tile
