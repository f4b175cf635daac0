// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/backend.h"

#include "infllm/ops/kernels.h"

namespace infllm {

Result<Buffer> allocate(const Backend& backend, std::size_t bytes) {
  return backend.kernels->allocate(backend, bytes);
}

Status copy_in(const Backend& backend, void* device, const void* host, std::size_t bytes) {
  return backend.kernels->copy_in(backend, device, host, bytes);
}

Status copy_out(const Backend& backend, void* host, const void* device, std::size_t bytes) {
  return backend.kernels->copy_out(backend, host, device, bytes);
}

}  // namespace infllm
