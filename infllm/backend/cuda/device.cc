// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/device.h"

#include <fmt/format.h>

#include "infllm/backend/cuda/blas.h"
#include "infllm/backend/cuda/decode/select_attend.h"
#include "infllm/backend/cuda/open.h"

namespace infllm::cuda {
namespace {

constexpr int kOldestCapability = 80;  // Ampere: bf16 tensor cores and cp.async

Result<int> attribute(cudaDeviceAttr which, int ordinal) {
  int value = 0;
  INFLLM_TRY(to_status("cuda", cudaDeviceGetAttribute(&value, which, ordinal)));
  return value;
}

}  // namespace

Device::~Device() {
  if (stream == nullptr || !owns_stream) return;
  cudaSetDevice(ordinal);
  cudaStreamDestroy(stream);
  cudaFree(exchange);
}

Status to_status(std::string_view step, cudaError_t error) {
  if (error == cudaSuccess) return {};
  const std::string message = fmt::format("{}: CUDA says \"{}\" ({})", step,
                                          cudaGetErrorString(error), cudaGetErrorName(error));
  switch (error) {
    case cudaErrorMemoryAllocation:
      return resource_exhausted(message);
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorNotSupported:
      return unsupported(message);
    default:
      return io_error(message);
  }
}

Status launched(std::string_view step) { return to_status(step, cudaGetLastError()); }

Result<int> count_devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return count;
  static_cast<void>(cudaGetLastError());  // it would be blamed on the first launch
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    static_cast<void>(cudaDriverGetVersion(&driver));
    return unsupported(
        driver == 0 ? std::string("no NVIDIA driver here; install one, or use --device cpu")
                    : fmt::format("the NVIDIA driver is for CUDA {}.{}, this program needs {}.{}; "
                                  "update the driver, or use --device cpu",
                                  driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
                                  CUDART_VERSION % 1000 / 10));
  }
  return unsupported(fmt::format("no NVIDIA GPU here ({}); use --device cpu",
                                 error == cudaSuccess ? "0 devices" : cudaGetErrorString(error)));
}

Result<int> capability_of(int ordinal) {
  return INFLLM_TRY(attribute(cudaDevAttrComputeCapabilityMajor, ordinal)) * 10 +
         INFLLM_TRY(attribute(cudaDevAttrComputeCapabilityMinor, ordinal));
}

Result<std::shared_ptr<Device>> open_device(int ordinal) {
  const int count = INFLLM_TRY(count_devices());
  if (ordinal >= count) {
    return unsupported(
        fmt::format("no device cuda:{}; this machine has cuda:0 to cuda:{}", ordinal, count - 1));
  }
  auto device = std::make_shared<Device>();
  device->ordinal = ordinal;
  device->blas = std::make_shared<Blas>();
  device->capability = INFLLM_TRY(capability_of(ordinal));
  if (device->capability < kOldestCapability) {
    return unsupported(fmt::format(
        "cuda:{} has compute capability {}.{}, expected 8.0 (Ampere) or newer; use --device cpu",
        ordinal, device->capability / 10, device->capability % 10));
  }
  device->sm_count = INFLLM_TRY(attribute(cudaDevAttrMultiProcessorCount, ordinal));
  device->shared_bytes = static_cast<std::size_t>(
      INFLLM_TRY(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal)));
  device->l2_bytes =
      static_cast<std::size_t>(INFLLM_TRY(attribute(cudaDevAttrL2CacheSize, ordinal)));
  INFLLM_TRY(to_status("cuda", cudaSetDevice(ordinal)));
  INFLLM_TRY(to_status("cuda", cudaStreamCreateWithFlags(&device->stream, cudaStreamNonBlocking)));
  if (device->capability >= 90) {
    const std::size_t bytes = sizeof(std::uint32_t) * decode::exchange_words(device->sm_count);
    INFLLM_TRY(to_status("cuda", cudaMalloc(reinterpret_cast<void**>(&device->exchange), bytes)));
    INFLLM_TRY(to_status("cuda", cudaMemset(device->exchange, 0xff, bytes)));
  }
  INFLLM_TRY(to_status("cuda", cudaDeviceSynchronize()));
  return device;
}

const Device& device_of(const Backend& backend) {
  const auto& device = *static_cast<const Device*>(backend.state.get());
  static_cast<void>(cudaSetDevice(device.ordinal));  // it was set before, so it can be set again
  return device;
}

Backend on_stream(const Backend& backend, void* stream) {
  const auto& opened = *static_cast<const Device*>(backend.state.get());
  auto device = std::make_shared<Device>();
  device->ordinal = opened.ordinal;
  device->sm_count = opened.sm_count;
  device->capability = opened.capability;
  device->shared_bytes = opened.shared_bytes;
  device->l2_bytes = opened.l2_bytes;
  device->stream = static_cast<cudaStream_t>(stream);
  device->owns_stream = false;
  device->blas = opened.blas;
  Backend same = backend;
  same.state = std::move(device);
  return same;
}

KeepCurrentDevice::KeepCurrentDevice() : ordinal_(-1) {
  if (cudaGetDevice(&ordinal_) == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  ordinal_ = -1;
}

KeepCurrentDevice::~KeepCurrentDevice() {
  if (ordinal_ >= 0) static_cast<void>(cudaSetDevice(ordinal_));
}

}  // namespace infllm::cuda
