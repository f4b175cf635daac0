// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/backend.h"

#include <fmt/format.h>

#include "infllm/ops/kernels.h"

namespace infllm {

Result<Buffer> allocate(const Backend& backend, std::size_t bytes) {
  return backend.kernels->allocate(backend, bytes);
}

Result<Buffer> allocate_visible(const Backend& backend, std::size_t bytes) {
  const auto own = backend.kernels->allocate_visible;
  return own != nullptr ? own(backend, bytes) : allocate(backend, bytes);
}

Status copy_in(const Backend& backend, void* device, const void* host, std::size_t bytes) {
  return backend.kernels->copy_in(backend, device, host, bytes);
}

Status copy_out(const Backend& backend, void* host, const void* device, std::size_t bytes) {
  return backend.kernels->copy_out(backend, host, device, bytes);
}

Result<DeviceInfo> device_info(const Backend& backend) {
  return backend.kernels->device_info == nullptr ? DeviceInfo()
                                                 : backend.kernels->device_info(backend);
}

bool is_device(const Backend& backend) { return backend.kernels->synchronize != nullptr; }

Status synchronize(const Backend& backend) {
  return is_device(backend) ? backend.kernels->synchronize(backend) : Status();
}

Result<Graph> record(const Backend& backend, const std::function<Status()>& body) {
  if (backend.kernels->record == nullptr) {
    return unsupported(fmt::format(
        "record: the device \"{}\" runs steps at once and records none; call them directly",
        backend.name));
  }
  return backend.kernels->record(backend, body);
}

Status replay(const Backend& backend, const Graph& graph) {
  if (backend.kernels->replay == nullptr || graph.handle == nullptr) {
    return invalid_argument(fmt::format(
        "replay: a graph that was not recorded on the device \"{}\"; record() one", backend.name));
  }
  return backend.kernels->replay(backend, graph);
}

}  // namespace infllm
