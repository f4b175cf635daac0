// SPDX-License-Identifier: Apache-2.0
//
// The numbers that linear-inl.h was tuned with; docs/kernels/cpu-linear.md has the measurements.
#pragma once

#include <cstdint>

namespace infllm::cpu {

// Tokens whose accumulators are held in registers at once: 6 x 64 floats are 24 of the 32 AVX-512
// registers.
inline constexpr int kTileTokens = 6;

// Tokens up to which int8 codes are widened in registers; for more, a slice is widened to scratch
// and multiplied as bf16.
inline constexpr int kFusedTokens = 4;

// Inputs that are summed in registers before they are added to the running total.
inline constexpr std::int64_t kBlockInputs = 512;

// Tokens and panels of one task of a prefill.
inline constexpr std::int64_t kTaskTokens = 16 * kTileTokens;
inline constexpr std::int64_t kTaskPanels = 8;

}  // namespace infllm::cpu
