// SPDX-License-Identifier: Apache-2.0
//
// What a Backend of a CUDA column carries: the device, its stream, its limits. Cells launch on the
// stream and return; nothing of this is global.
//
//   Status swiglu(const Backend& backend, const SwigluParams& p, std::span<std::byte>) {
//     const Device& device = device_of(backend);
//     swiglu_kernel<<<grid, block, 0, device.stream>>>(...);
//     return launched("swiglu");
//   }
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

#include "infllm/ops/backend.h"

namespace infllm::cuda {

class Blas;  // blas.h: cuBLASLt, loaded when the device is opened

struct Device {
  Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device();

  int ordinal = 0;
  int sm_count = 0;
  int capability = 0;            // 90 for 9.0
  std::size_t shared_bytes = 0;  // the most that a block may ask for
  std::size_t l2_bytes = 0;
  cudaStream_t stream = nullptr;
  bool owns_stream = true;     // false: on_stream() made this
  std::shared_ptr<Blas> blas;  // never null
  // All ones between kernels: words that thread blocks of one kernel hand each other
  // (decode/exchange.cuh, decode::exchange_words() of them). Null before 9.0, and on a stream of
  // the caller's, whose kernels may run beside this one's.
  std::uint32_t* exchange = nullptr;
};

// kUnsupported says what is missing: the driver, a device of that number, its capability.
Result<int> count_devices();             // at least 1
Result<int> capability_of(int ordinal);  // 90 for 9.0
Result<std::shared_ptr<Device>> open_device(int ordinal);

// The state of a backend that this column opened. Makes its device the calling thread's current
// one, so every cell begins with this call.
const Device& device_of(const Backend& backend);

// kResourceExhausted for memory, kUnsupported for what the device cannot do, kIoError otherwise:
// "attend: CUDA says \"misaligned address\" (cudaErrorMisalignedAddress)".
Status to_status(std::string_view step, cudaError_t error);

// The error of the launch that was just made, if any.
Status launched(std::string_view step);

}  // namespace infllm::cuda
