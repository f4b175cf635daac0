// SPDX-License-Identifier: Apache-2.0
//
// Launching kernels back to back. On devices that have programmatic dependent launch (9.0 on) a
// kernel's blocks may be put on the chip while the kernel before still runs; the next two functions
// keep the order.
//
//   __global__ void scale(float* x, const float* weight) {
//     start_next();                       // the kernel behind may come as soon as there is room
//     const float w = weight[threadIdx.x];  // weights alone may be read early: nobody writes them
//     wait_for_previous();                // before anything else is read or written
//     x[threadIdx.x] *= w;
//   }
//   return launch(device, "scale", scale, grid, block, 0, x, weight);
//
// A kernel that launch() starts MUST call wait_for_previous() in every thread, also in those that
// have nothing to do: the kernel behind it waits for its end and takes that for the end of
// everything before.
//
// Kernels that take no part in this, and may want more shared memory than a kernel gets unasked:
//
//   return start("attend", attend_kernel, grid, threads, sizeof(Shared), stream, args);
#pragma once

#include <cuda_runtime.h>

#include <string_view>

#include "infllm/backend/cuda/device.h"

namespace infllm::cuda {

__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void start_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Asks for memory to be brought into L2: harmless whatever is there, even if it is written later.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* address,
                                         [[maybe_unused]] int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes));
#endif
}

template <typename... Expected, typename... Given>
Status launch(const Device& device, std::string_view step, void (*kernel)(Expected...), dim3 grid,
              dim3 block, std::size_t shared_bytes, const Given&... arguments) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = device.stream;
  config.attrs = &overlap;
  config.numAttrs = device.capability >= 90 ? 1 : 0;
  return to_status(step, cudaLaunchKernelEx(&config, kernel, Expected(arguments)...));
}

// Does nothing for an empty grid.
template <typename... Expected, typename... Given>
Status start(std::string_view step, void (*kernel)(Expected...), dim3 grid, unsigned threads,
             std::size_t shared_bytes, cudaStream_t stream, const Given&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {};
  INFLLM_TRY(
      to_status(step, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared_bytes))));
  kernel<<<grid, threads, shared_bytes, stream>>>(Expected(arguments)...);
  return launched(step);
}

}  // namespace infllm::cuda
