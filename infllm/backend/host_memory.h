// SPDX-License-Identifier: Apache-2.0
//
// Memory of the columns that run on the host.
#pragma once

#include "infllm/ops/backend.h"

namespace infllm {

Result<Buffer> host_allocate(const Backend& backend, std::size_t bytes);
Status host_copy(const Backend& backend, void* to, const void* from, std::size_t bytes);

}  // namespace infllm
