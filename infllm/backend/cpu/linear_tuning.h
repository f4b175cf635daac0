// SPDX-License-Identifier: Apache-2.0
//
// The numbers that linear-inl.h was tuned with; docs/kernels/cpu-linear.md has the measurements.
#pragma once

#include <cstdint>

namespace infllm::cpu {

// Tokens whose accumulators are held in registers at once: 6 x 64 floats are 24 of the 32 AVX-512
// registers.
inline constexpr int kTileTokens = 6;

// Inputs that are summed in registers before they are added to the running total.
inline constexpr std::int64_t kBlockInputs = 256;

// Tokens and panels of one task of a prefill.
inline constexpr std::int64_t kTaskTokens = 32 * kTileTokens;
inline constexpr std::int64_t kTaskPanels = 4;

}  // namespace infllm::cpu
