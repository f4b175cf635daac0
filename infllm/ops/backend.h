// SPDX-License-Identifier: Apache-2.0
//
// A backend is a device, its kernel table and what the table's functions need to run (threads, a
// stream). It is opened once (backend/open.h) and handed down; nothing below it is global.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
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
// Memory for the little that a step hands to the host, who reads it after synchronize() without a
// copy. Steps may read it, too, but slowly. On host backends it is memory like any other.
Result<Buffer> allocate_visible(const Backend& backend, std::size_t bytes);
// Both are in order with the steps. The host memory may be used again when they return; after
// copy_out() everything that ran before it is done. copy_in() takes memory of the backend, too.
Status copy_in(const Backend& backend, void* device, const void* host, std::size_t bytes);
Status copy_out(const Backend& backend, void* host, const void* device, std::size_t bytes);

// What a device is and has of its own. Nothing of it on host backends, which share the machine's.
struct DeviceInfo {
  std::string name;              // "NVIDIA H200"
  std::int64_t total_bytes = 0;  // of memory
  std::int64_t free_bytes = 0;   // now
};
Result<DeviceInfo> device_info(const Backend& backend);

// Whether work runs behind the caller's back, in memory of its own, and has to be waited for.
bool is_device(const Backend& backend);

// Waits for every step that was started, and tells of their errors. Host backends never wait.
Status synchronize(const Backend& backend);

// A recorded run of steps, to be started again with one call. It keeps the pointers and the host
// numbers (maxima, counts, scales) that it was recorded with, so memory must stay where it is and
// the maxima must bound every later step; the arrays' contents are read anew each time.
struct Graph {
  std::shared_ptr<void> handle;
};

// Records the steps that `body` starts; none of them runs. Memory must be allocated and copied
// outside. kUnsupported on host backends, which gain nothing from it.
Result<Graph> record(const Backend& backend, const std::function<Status()>& body);
Status replay(const Backend& backend, const Graph& graph);

}  // namespace infllm
