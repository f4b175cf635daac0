// SPDX-License-Identifier: Apache-2.0
//
// Hopper's copy engine: boxes of tensors and plain byte ranges between global and shared memory,
// started by one thread. Loads complete on an mbarrier, stores on the issuing thread's bulk group.
// Coordinates are in elements, the innermost first; boxes that reach out of the tensor read zeros
// and write nothing. Shared addresses are 128-byte aligned, 1024-byte for swizzled boxes.
// Tensor maps come from tensor_map.h and are passed as __grid_constant__ kernel parameters.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "infllm/backend/cuda/tile/barrier.cuh"

namespace infllm::cuda::tile {

// L2 eviction priorities, in the encoding that cache_hint operands take.
enum class CacheHint : std::uint64_t {
  kEvictNormal = 0x1000000000000000,
  kEvictFirst = 0x12F0000000000000,
  kEvictLast = 0x14F0000000000000,
};

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Shared memory that ordinary stores wrote becomes visible to the copy engine and to wgmma.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void tma_load_1d(std::uint64_t* barrier, void* to, const void* from,
                                            std::uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void tma_load_1d(std::uint64_t* barrier, void* to, const void* from,
                                            std::uint32_t bytes, CacheHint hint) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(static_cast<std::uint64_t>(hint))
      : "memory");
}

__device__ __forceinline__ void tma_load_2d(const CUtensorMap* map, std::uint64_t* barrier,
                                            void* to, std::int32_t c0, std::int32_t c1,
                                            CacheHint hint = CacheHint::kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1),
      "l"(static_cast<std::uint64_t>(hint))
      : "memory");
}

__device__ __forceinline__ void tma_load_3d(const CUtensorMap* map, std::uint64_t* barrier,
                                            void* to, std::int32_t c0, std::int32_t c1,
                                            std::int32_t c2,
                                            CacheHint hint = CacheHint::kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2),
      "l"(static_cast<std::uint64_t>(hint))
      : "memory");
}

__device__ __forceinline__ void tma_load_4d(const CUtensorMap* map, std::uint64_t* barrier,
                                            void* to, std::int32_t c0, std::int32_t c1,
                                            std::int32_t c2, std::int32_t c3,
                                            CacheHint hint = CacheHint::kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
      "l"(static_cast<std::uint64_t>(hint))
      : "memory");
}

__device__ __forceinline__ void tma_load_5d(const CUtensorMap* map, std::uint64_t* barrier,
                                            void* to, std::int32_t c0, std::int32_t c1,
                                            std::int32_t c2, std::int32_t c3, std::int32_t c4,
                                            CacheHint hint = CacheHint::kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4),
      "l"(static_cast<std::uint64_t>(hint))
      : "memory");
}

// The box lands at the same offset in every block of the cluster that `ctas` has a bit for, and
// each of them counts the bytes on its own barrier.
__device__ __forceinline__ void tma_load_5d_multicast(const CUtensorMap* map,
                                                      std::uint64_t* barrier, void* to,
                                                      std::int32_t c0, std::int32_t c1,
                                                      std::int32_t c2, std::int32_t c3,
                                                      std::int32_t c4, std::uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "h"(ctas)
      : "memory");
}

__device__ __forceinline__ void tma_store_1d(void* to, const void* from, std::uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void tma_store_3d(const CUtensorMap* map, const void* from,
                                             std::int32_t c0, std::int32_t c1, std::int32_t c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// Adds floats in shared memory to floats in global memory.
__device__ __forceinline__ void tma_reduce_add_1d(float* to, const float* from,
                                                  std::uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
      "r"(shared_address(from)), "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void tma_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until at most N of this thread's groups still READ shared memory: it may be overwritten.
template <int N>
__device__ __forceinline__ void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// Until at most N of this thread's groups are incomplete.
template <int N>
__device__ __forceinline__ void tma_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace infllm::cuda::tile
