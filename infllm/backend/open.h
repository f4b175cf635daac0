// SPDX-License-Identifier: Apache-2.0
//
// The only place that knows every column.
//
//   "reference"                     float64, plain loops
//   "reference:f32" "reference:f16" "reference:bf16"
//                                   the same, rounded where an honest kernel of that type rounds:
//                                   the yardstick for other columns' errors, not listed as a device
//   "cpu"                           the best of the next line that this machine has
//   "cpu:portable" "cpu:avx2" "cpu:avx512" "cpu:avx512_bf16" "cpu:neon"
//   "cuda" "cuda:1" "cuda:0:sm80" "cuda:0:sm90" "cuda:0:sm90:f16"
//                                   a CUDA device, its column and its 16-bit type (cuda/open.h)
//   "auto"                          the fastest device there is
//
// A name that is unknown, not compiled in or not supported by this machine is refused with the list
// of those that are.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "infllm/ops/backend.h"

namespace infllm {

struct OpenOptions {
  int threads = 0;  // of host backends; 0: one per hardware thread
};

Result<Backend> open_backend(std::string_view name, const OpenOptions& options = {});

// Every full name that open_backend accepts on this machine, slowest first ("reference" first).
std::vector<std::string> available_backends();

}  // namespace infllm
