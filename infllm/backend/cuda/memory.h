// SPDX-License-Identifier: Apache-2.0
//
// Device memory, copies and graphs of the CUDA columns (ops/backend.h says what each promises).
#pragma once

#include "infllm/ops/backend.h"

namespace infllm::cuda {

Result<Buffer> allocate(const Backend& backend, std::size_t bytes);
Result<Buffer> allocate_visible(const Backend& backend, std::size_t bytes);
Status copy_in(const Backend& backend, void* device, const void* host, std::size_t bytes);
Status copy_out(const Backend& backend, void* host, const void* device, std::size_t bytes);
Result<DeviceInfo> device_info(const Backend& backend);  // info.cc
Status synchronize(const Backend& backend);
Result<Graph> record(const Backend& backend, const std::function<Status()>& body);
Status replay(const Backend& backend, const Graph& graph);

}  // namespace infllm::cuda
