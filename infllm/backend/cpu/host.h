// SPDX-License-Identifier: Apache-2.0
//
// Memory of the host backends, and the list of cpu columns.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#include "infllm/ops/kernels.h"

namespace infllm::cpu {

Result<Buffer> host_allocate(const Backend& backend, std::size_t bytes);
Status host_copy(const Backend& backend, void* to, const void* from, std::size_t bytes);

// One instruction set that this binary was built with.
struct Column {
  std::string_view name;  // "avx2"
  bool (*supported)();    // by this machine
  const Kernels& (*kernels)();
};

// Slowest first; "portable" is always there.
std::span<const Column> columns();

}  // namespace infllm::cpu
