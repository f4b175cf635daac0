// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/memory.h"

namespace infllm::cuda {

Result<DeviceInfo> device_info(const Backend& backend) {
  const Device& device = device_of(backend);
  std::size_t free = 0;
  std::size_t total = 0;
  INFLLM_TRY(to_status("device_info", cudaMemGetInfo(&free, &total)));
  cudaDeviceProp properties{};
  INFLLM_TRY(to_status("device_info", cudaGetDeviceProperties(&properties, device.ordinal)));
  return DeviceInfo{.name = properties.name,
                    .total_bytes = static_cast<std::int64_t>(total),
                    .free_bytes = static_cast<std::int64_t>(free)};
}

}  // namespace infllm::cuda
