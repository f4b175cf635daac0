// SPDX-License-Identifier: Apache-2.0
//
// Memory that a kernel must write before anybody reads it is NaN in every floating-point type, so
// that reading it too early shows in the result. With INFLLM_UNPOISONED in the environment it is
// left as it comes: compute-sanitizer's initcheck finds the same mistake by itself, unless it was
// filled. The memory is filled when poison() returns: a fill of the default stream that is still on
// its way could come after what a stream that does not wait for it has written.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>

namespace infllm::cuda {

inline cudaError_t poison(void* data, std::size_t bytes) {
  static const bool wanted = std::getenv("INFLLM_UNPOISONED") == nullptr;
  if (!wanted) return cudaSuccess;
  const cudaError_t status = cudaMemset(data, 0xff, bytes);
  return status == cudaSuccess ? cudaStreamSynchronize(nullptr) : status;
}

}  // namespace infllm::cuda
