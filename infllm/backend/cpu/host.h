// SPDX-License-Identifier: Apache-2.0
//
// The list of cpu columns.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#include "infllm/backend/host_memory.h"
#include "infllm/ops/kernels.h"

namespace infllm::cpu {

// One instruction set that this binary was built with.
struct Column {
  std::string_view name;  // "avx2"
  bool (*supported)();    // by this machine
  const Kernels& (*kernels)();
};

// Slowest first; "portable" is always there.
std::span<const Column> columns();

}  // namespace infllm::cpu
