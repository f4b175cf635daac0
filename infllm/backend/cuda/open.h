// SPDX-License-Identifier: Apache-2.0
//
// The CUDA columns of this build: "cuda:N:sm80" runs on every device from Ampere on, "cuda:N:sm90"
// adds kernels for Hopper's own instructions. Hidden states, caches and weights are bf16, or f16
// under ":f16".
//
// A build without CUDA has the same names (absent.cc): nothing is available, and open() says how to
// build with it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "infllm/ops/backend.h"

namespace infllm::cuda {

// Every full name that open() takes here, slowest first; empty without a driver or a device.
std::vector<std::string> available();

// "cuda", "cuda:N", "cuda:N:sm80", "cuda:N:sm90", each also with ":f16" behind it. Without a column
// the fastest that the device runs. kUnsupported says what this machine or build lacks.
Result<Backend> open(std::string_view name);

// The same device with a stream of the caller's (a cudaStream_t), for a caller who has work of his
// own in order there. The stream stays his. Cheap, and from any thread; `backend` is one that
// open() gave.
Backend on_stream(const Backend& backend, void* stream);

// Every step makes its device the thread's current one. This puts back the one that was.
class KeepCurrentDevice {
 public:
  KeepCurrentDevice();
  ~KeepCurrentDevice();
  KeepCurrentDevice(const KeepCurrentDevice&) = delete;
  KeepCurrentDevice& operator=(const KeepCurrentDevice&) = delete;

 private:
  int ordinal_;  // -1: there was none
};

}  // namespace infllm::cuda
