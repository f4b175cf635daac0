// SPDX-License-Identifier: Apache-2.0
//
// Device memory of the programs that test kernels by themselves. It is poisoned (poison.h), and the
// constructor returns when what it fills is there: the columns' streams do not wait for the default
// one, which does the filling.
//
//   const Array<float> scores(rows);
//   const Array<int> lists(std::vector<int>{0, 3, 5});
//   kernel<<<...>>>(lists.data(), scores.data());
//   const std::vector<float> got = scores.host();
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "tests/cuda/must.h"
#include "tests/cuda/poison.h"

namespace infllm::cuda {

template <typename T>
class Array {
 public:
  Array() = default;
  explicit Array(std::size_t count) : size_(count) {
    must(cudaMalloc(&data_, std::max<std::size_t>(count, 1) * sizeof(T)));
    poison();
  }
  explicit Array(const std::vector<T>& host) : Array(host.size()) {
    must(cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyDefault));
    must(cudaStreamSynchronize(nullptr));
  }
  Array(Array&& other) noexcept { *this = std::move(other); }
  Array& operator=(Array&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Array() { cudaFree(data_); }

  void poison() const {
    must(cuda::poison(data_, size_ * sizeof(T)));
    must(cudaStreamSynchronize(nullptr));
  }

  T* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::vector<T> host() const { return host(0, size_); }
  std::vector<T> host(std::size_t first, std::size_t count) const {
    std::vector<T> to(count);
    must(cudaMemcpy(to.data(), data_ + first, count * sizeof(T), cudaMemcpyDefault));
    return to;
  }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace infllm::cuda
