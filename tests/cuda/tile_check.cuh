// SPDX-License-Identifier: Apache-2.0
//
// What the tests of the PTX layer share: device arrays, small numbers, one line a verdict.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "infllm/backend/cuda/tile/tensor_map.h"
#include "tests/cuda/must.h"
#include "tests/cuda/poison.h"

namespace infllm::cuda::tile {

inline int failures = 0;

inline void verdict(const std::string& what, bool good) {
  std::printf("%s %s\n", good ? "ok  " : "FAIL", what.c_str());
  if (!good) ++failures;
}

template <typename T>
struct Managed {  // device memory with a host copy
  explicit Managed(std::size_t count) : host(count) {
    must(cudaMalloc(&device, count * sizeof(T)));
    must(poison(device, count * sizeof(T)));
  }
  explicit Managed(const std::vector<T>& values) : Managed(values.size()) {
    host = values;
    must(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  Managed(const Managed&) = delete;
  ~Managed() { cudaFree(device); }
  const std::vector<T>& read() {
    must(cudaDeviceSynchronize());
    must(cudaMemcpy(host.data(), device, host.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
  T* device = nullptr;
  std::vector<T> host;
};

template <typename T>
std::vector<T> small_numbers(std::size_t count, unsigned seed) {
  std::vector<T> values(count);
  for (std::size_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    values[i] = T(static_cast<float>(static_cast<int>(seed >> 24) % 9 - 4));
  }
  return values;
}

template <typename T>
constexpr DType dtype_of() {
  return std::is_same_v<T, __half> ? DType::kF16 : DType::kBF16;
}

inline CUtensorMap map_of(const TensorMapSpec& spec) {
  Result<CUtensorMap> map = make_tensor_map(spec);
  if (!map.ok()) {
    std::printf("%s\n", map.status().message().c_str());
    std::exit(2);
  }
  return *map;
}

inline int finish() {
  std::printf("%s\n", failures == 0 ? "all checks passed" : "CHECKS FAILED");
  return failures == 0 ? 0 : 1;
}

}  // namespace infllm::cuda::tile
