// SPDX-License-Identifier: Apache-2.0
//
// The 16-bit types of the CUDA columns, eight at a time: 16 bytes, the widest access a thread has.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "infllm/core/dtype.h"

namespace infllm::cuda {

inline constexpr int kVector = 8;  // elements of 16 bytes

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// To the nearest, ties to even.
template <typename T>
__device__ __forceinline__ T to(float x);
template <>
__device__ __forceinline__ __nv_bfloat16 to<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half to<__half>(float x) {
  return __float2half_rn(x);
}

template <typename T>
struct alignas(16) Vector {
  T values[kVector];
};

template <typename T>
__device__ __forceinline__ void load(const T* from, float (&x)[kVector]) {
  const Vector<T> v = *reinterpret_cast<const Vector<T>*>(from);
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = to_float(v.values[i]);
}

template <typename T>
__device__ __forceinline__ void store(T* where, const float (&x)[kVector]) {
  Vector<T> v;
#pragma unroll
  for (int i = 0; i < kVector; ++i) v.values[i] = to<T>(x[i]);
  *reinterpret_cast<Vector<T>*>(where) = v;
}

template <typename T>
__device__ __forceinline__ void load_one(const T* from, float (&x)[1]) {
  x[0] = to_float(*from);
}

// Whether 16-byte accesses fit an array with rows of `stride` elements.
inline bool is_vector_aligned(const void* data, std::int64_t stride = 0) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride % kVector == 0;
}

// body(T()) with the column's 16-bit type.
template <typename Body>
auto with_type(DType dtype, Body&& body) {
  return dtype == DType::kF16 ? body(__half()) : body(__nv_bfloat16());
}

}  // namespace infllm::cuda
