// SPDX-License-Identifier: Apache-2.0
//
// A backend is a device, its kernel table and what the table's functions need to run (threads, a
// stream). It is opened once (backend/open.h) and handed down; nothing below it is global.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "infllm/core/parallel.h"
#include "infllm/core/status.h"

namespace infllm {

struct Kernels;

struct Backend {
  std::string name;                  // "cpu:avx512_bf16", "reference", "cuda:0:sm90"
  const Kernels* kernels = nullptr;  // static storage
  std::shared_ptr<ThreadPool> pool;  // host backends
  std::shared_ptr<void> state;       // a column's own: stream, library handles
};

// Memory of a backend: the only owner of device memory. Movable.
class Buffer {
 public:
  Buffer() = default;
  Buffer(std::shared_ptr<std::byte> data, std::size_t bytes)
      : data_(std::move(data)), bytes_(bytes) {}

  std::byte* data() const { return data_.get(); }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<std::byte> data_;
  std::size_t bytes_ = 0;
};

// Uninitialised memory, aligned to 64 bytes; kResourceExhausted says how much was asked for.
Result<Buffer> allocate(const Backend& backend, std::size_t bytes);
Status copy_in(const Backend& backend, void* device, const void* host, std::size_t bytes);
Status copy_out(const Backend& backend, void* host, const void* device, std::size_t bytes);

}  // namespace infllm
