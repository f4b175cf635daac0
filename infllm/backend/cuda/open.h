// SPDX-License-Identifier: Apache-2.0
//
// The CUDA columns of this build: "cuda:N:sm80" runs on every device from Ampere on, "cuda:N:sm90"
// adds kernels for Hopper's own instructions. Hidden states, caches and weights are bf16, or f16
// under ":f16".
//
// A build without CUDA has the same two functions (absent.cc): nothing is available, and open()
// says how to build with it.
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

}  // namespace infllm::cuda
