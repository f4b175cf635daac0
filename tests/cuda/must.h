// SPDX-License-Identifier: Apache-2.0
//
// What the programs that test kernels by themselves do about errors, and how they take times.
//
//   must(cudaMalloc(&data, bytes));              // or says where and what, and ends the program
//   must(sm80::attend(backend, params, {}));
//   const std::vector<float> ms = milliseconds(stream, 2, 11, [&] { ... });  // median: ms[5]
//   const double usual = median_milliseconds(stream, [&] { ... });
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <source_location>
#include <vector>

#include "infllm/core/status.h"

namespace infllm::cuda {

inline void must(cudaError_t error,
                 const std::source_location& where = std::source_location::current()) {
  if (error == cudaSuccess) return;
  std::printf("FAILED: %s:%u: %s\n", where.file_name(), where.line(), cudaGetErrorString(error));
  std::fflush(stdout);
  std::exit(1);
}

inline void must(const Status& status,
                 const std::source_location& where = std::source_location::current()) {
  if (status.ok()) return;
  std::printf("FAILED: %s:%u: %s\n", where.file_name(), where.line(), status.message().c_str());
  std::fflush(stdout);
  std::exit(1);
}

// Times of `repeats` calls on `stream` behind `warm` others, ascending.
template <typename Run>
std::vector<float> milliseconds(cudaStream_t stream, int warm, int repeats, Run&& run) {
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin));
  must(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = -warm; i < repeats; ++i) {
    must(cudaEventRecord(begin, stream));
    run();
    must(cudaEventRecord(end, stream));
    must(cudaEventSynchronize(end));
    float ms = 0;
    must(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 0) times.push_back(ms);
  }
  must(cudaEventDestroy(begin));
  must(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return times;
}

// The median of five calls behind one.
template <typename Run>
double median_milliseconds(cudaStream_t stream, Run&& run) {
  return milliseconds(stream, 1, 5, run)[2];
}

}  // namespace infllm::cuda
