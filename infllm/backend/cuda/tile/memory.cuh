// SPDX-License-Identifier: Apache-2.0
//
// Accesses to global memory whose order or caching is part of what the caller means. All are
// volatile to the compiler: they happen once each, and those of one kind in program order, which
// __ldg() and its sisters leave open. Addresses are multiples of what is read or written.
//
//   relaxed    seen by, and sees, the other thread blocks of the device; orders nothing else
//   acquire, release   orders what stands behind the load, or before the store, as well
//   cg         past L1 (what one warp reads once)
//   ca         through L1 (what all warps of a thread block read)
#pragma once

#include <cstdint>

namespace infllm::cuda::tile {

__device__ __forceinline__ void store_relaxed(std::uint32_t* to, std::uint32_t x) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
__device__ __forceinline__ void store_relaxed(std::uint16_t* to, std::uint16_t x) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to), "h"(x) : "memory");
}
__device__ __forceinline__ void store_relaxed(std::uint32_t* to, uint2 x) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(x.x), "r"(x.y)
               : "memory");
}
__device__ __forceinline__ void store_relaxed(std::uint32_t* to, uint4 x) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

__device__ __forceinline__ void load_relaxed(const std::uint32_t* from, std::uint32_t& x) {
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
}
__device__ __forceinline__ void load_relaxed(const std::uint32_t* from, uint2& x) {
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(x.x), "=r"(x.y)
               : "l"(from)
               : "memory");
}
__device__ __forceinline__ void load_relaxed(const std::uint32_t* from, uint4& x) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from)
               : "memory");
}

__device__ __forceinline__ std::uint32_t load_acquire(const std::uint32_t* from) {
  std::uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}
__device__ __forceinline__ void store_release(std::uint32_t* to, std::uint32_t x) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

__device__ __forceinline__ uint4 load_cg(const uint4* from) {
  uint4 x;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

__device__ __forceinline__ uint4 load_ca(const uint4* from) {
  uint4 x;
  asm volatile("ld.global.ca.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}
__device__ __forceinline__ std::int32_t load_ca(const std::int32_t* from) {
  std::int32_t x;
  asm volatile("ld.global.ca.b32 %0, [%1];" : "=r"(x) : "l"(from));
  return x;
}
__device__ __forceinline__ std::uint32_t load_ca(const std::uint8_t* from) {
  std::uint32_t x;
  asm volatile("ld.global.ca.u8 %0, [%1];" : "=r"(x) : "l"(from));
  return x;
}

// From shared memory or, past L1, from global memory.
__device__ __forceinline__ uint2 load_volatile(const uint2* from) {
  uint2 x;
  asm volatile("ld.volatile.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(from));
  return x;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Into L2: harmless whatever is there, even if it is written later. Bytes are a multiple of 16.
__device__ __forceinline__ void prefetch_l2(const void* from, std::uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
}

// Adds to four floats, each by itself atomically.
__device__ __forceinline__ void reduce_add(float* to, float4 x) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x), "f"(x.y),
               "f"(x.z), "f"(x.w)
               : "memory");
}

#endif

}  // namespace infllm::cuda::tile
