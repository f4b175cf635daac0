// SPDX-License-Identifier: Apache-2.0
//
// Words that thread blocks of one launch hand each other through global memory. A word is its own
// flag: it is kNothing until its one writer publishes something else, so a reader needs no barrier
// and no second look-up, only patience. On an H200 an exchange among all thread blocks takes 0.55
// us, a barrier of all with the same data read behind it 1.5 us.
//
// Whoever waits must be sure that the writer runs: launch cooperatively, or wait for nobody else.
#pragma once

#include <cstdint>

#include "infllm/backend/cuda/decode/row.cuh"

namespace infllm::cuda::decode {

// A NaN that no computation produces (those are 0x7fffffff), no key and no block.
inline constexpr std::uint32_t kNothing = 0xffffffff;

__device__ __forceinline__ void publish(std::uint32_t* cell, std::uint32_t word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(cell), "r"(word) : "memory");
}

__device__ __forceinline__ void publish(std::uint16_t* cell, std::uint32_t half) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(cell),
               "h"(static_cast<std::uint16_t>(half))
               : "memory");
}

__device__ __forceinline__ void publish(std::uint32_t* cells, uint2 words) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(cells), "r"(words.x),
               "r"(words.y)
               : "memory");
}
__device__ __forceinline__ void publish(std::uint32_t* cells, uint4 words) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(cells), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}
// A float; a NaN that looks like nothing becomes another one.
__device__ __forceinline__ std::uint32_t word_of(float x) {
  return x == x ? __float_as_uint(x) : 0x7fffffff;
}

__device__ __forceinline__ void publish(std::uint32_t* cells, float2 x) {
  publish(cells, make_uint2(word_of(x.x), word_of(x.y)));
}
__device__ __forceinline__ void publish(std::uint32_t* cells, float4 x) {
  publish(cells, make_uint4(word_of(x.x), word_of(x.y), word_of(x.z), word_of(x.w)));
}

__device__ __forceinline__ void look(const std::uint32_t* cell, std::uint32_t& word) {
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(cell) : "memory");
}
__device__ __forceinline__ void look(const std::uint32_t* cells, uint2& words) {
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(words.x), "=r"(words.y)
               : "l"(cells)
               : "memory");
}
__device__ __forceinline__ void look(const std::uint32_t* cells, uint4& words) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(cells)
               : "memory");
}

__device__ __forceinline__ bool is_there(std::uint32_t word) { return word != kNothing; }
__device__ __forceinline__ bool is_there(uint2 words) {
  return is_there(words.x) && is_there(words.y);
}
__device__ __forceinline__ bool is_there(uint4 words) {
  return is_there(words.x) && is_there(words.y) && is_there(words.z) && is_there(words.w);
}

// Up to kMost cells, all of them at once: number i < count at cells + i * stride.
template <int kMost, typename Words>
__device__ __forceinline__ void look_at(const std::uint32_t* cells, std::int64_t stride, int count,
                                        Words (&words)[kMost]) {
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    if (i < count) look(cells + i * stride, words[i]);
  }
}
template <int kMost, typename Words>
__device__ __forceinline__ bool are_there(int count, const Words (&words)[kMost]) {
  bool all = true;
#pragma unroll
  for (int i = 0; i < kMost; ++i) all &= i >= count || is_there(words[i]);
  return all;
}

// Waits for them, by all lanes of a warp: they leave together, since what lanes do apart they do
// one after another until something brings them together again.
template <int kMost, typename Words>
__device__ __forceinline__ void take(const std::uint32_t* cells, std::int64_t stride, int count,
                                     Words (&words)[kMost]) {
  do {
    look_at(cells, stride, count, words);
  } while (__any_sync(kAllLanes, !are_there(count, words)));
}

}  // namespace infllm::cuda::decode
