// SPDX-License-Identifier: Apache-2.0
//
// An opened backend as Python holds it: every call names the stream that it runs on, lets go of the
// interpreter's lock, and leaves the thread's current CUDA device as it was.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "infllm/backend/cuda/open.h"
#include "infllm/ops/kernels.h"
#include "python/bindings/raise.h"

namespace infllm::python {

class Device {
 public:
  explicit Device(Backend backend)
      : backend_(std::move(backend)), is_device_(is_device(backend_)) {}

  const Backend& backend() const { return backend_; }
  // Host backends read the arrays in place, so their contents can be checked.
  bool is_host() const { return !is_device_; }

  // body(backend), which starts nothing, under the lock.
  template <typename Body>
  auto ask(Body&& body) const {
    std::optional<cuda::KeepCurrentDevice> keep;
    if (is_device_) keep.emplace();
    return body(backend_);
  }

  // body(backend) on the caller's stream (a cudaStream_t; hosts have none). The threads of a host
  // backend serve one caller at a time.
  template <typename Body>
  void run(std::uintptr_t stream, Body&& body) const {
    Status status;
    {
      const nanobind::gil_scoped_release unlocked;
      if (is_device_) {
        const cuda::KeepCurrentDevice keep;
        status = body(cuda::on_stream(backend_, reinterpret_cast<void*>(stream)));
      } else {
        const std::lock_guard lock(mutex_);
        status = body(backend_);
      }
    }
    raise_if_failed(status);
  }

 private:
  Backend backend_;
  bool is_device_;
  mutable std::mutex mutex_;
};

void bind_device(nanobind::module_& module);

}  // namespace infllm::python
