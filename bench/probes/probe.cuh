// SPDX-License-Identifier: Apache-2.0
//
// Timing and output of the probes: small programs that ask a card what it gives, before a kernel is
// planned on it. Each prints one JSON object a line. Build one with
//
//   nvcc -std=c++20 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -I. \
//     bench/probes/wgmma_rate.cu infllm/backend/cuda/tile/tensor_map.cc infllm/core/status.cc -lfmt
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace infllm::probes {

inline void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA: %s\n", cudaGetErrorString(error));
  std::exit(2);
}

inline int sm_count() {
  int count = 0;
  must(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
  return count;
}

// Median of several timed calls after a warm one.
template <class Launch>
double median_ms(Launch&& launch, int repeats = 5) {
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin));
  must(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = -1; i < repeats; ++i) {
    must(cudaEventRecord(begin));
    launch();
    must(cudaGetLastError());
    must(cudaEventRecord(end));
    must(cudaEventSynchronize(end));
    float ms = 0;
    must(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 0) times.push_back(ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// Random bits as bf16 numbers between 1 and 2, of both signs: power and clocks depend on data.
__global__ void fill_random(unsigned* words, long long count) {
  for (long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<long long>(gridDim.x) * blockDim.x) {
    unsigned long long x = static_cast<unsigned long long>(i) * 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    words[i] = (static_cast<unsigned>(x >> 32) & 0x807f807fu) | 0x3f803f80u;
  }
}

}  // namespace infllm::probes
