// SPDX-License-Identifier: Apache-2.0
//
// Barriers of a thread block: mbarriers in shared memory, which count arrivals and the bytes of
// asynchronous copies, and the sixteen named hardware barriers, which stop groups of warps.
//
//   __shared__ std::uint64_t full;                  8-byte aligned
//   if (threadIdx.x == 0) { mbarrier_init(&full, 1); fence_mbarrier_init(); }
//   __syncthreads();
//   producer: mbarrier_arrive_expect_tx(&full, bytes); tma_load_2d(&map, &full, ...);
//   consumer: mbarrier_wait(&full, phase); phase ^= 1;
//
// A fresh barrier is in phase 0: waiting for parity 1 returns at once, waiting for parity 0 blocks
// until the first phase is complete. mbarriers need sm_90 (PTX ISA, "mbarrier").
#pragma once

#include <cstdint>

namespace infllm::cuda::tile {

// The 32-bit address that PTX takes for shared memory.
__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void mbarrier_init(std::uint64_t* barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine and to the cluster's other blocks.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and adds `bytes` to what the phase waits for.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(std::uint64_t* barrier,
                                                          std::uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Arrives at the barrier of the same address in another block of the cluster.
__device__ __forceinline__ void mbarrier_arrive_remote(std::uint64_t* barrier, std::uint32_t cta) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(cta)
      : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(std::uint64_t* barrier, std::uint32_t parity) {
  std::uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// Returns once the phase of that parity is complete.
__device__ __forceinline__ void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// Barrier 0 is __syncthreads(); `id` is 1 to 15, `threads` a multiple of 32 that counts everybody
// who syncs or arrives.
__device__ __forceinline__ void named_barrier_sync(std::uint32_t id, std::uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(std::uint32_t id, std::uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace infllm::cuda::tile
