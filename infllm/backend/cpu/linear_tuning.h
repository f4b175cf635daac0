// SPDX-License-Identifier: Apache-2.0
//
// The numbers that linear-inl.h was tuned with, on Zen 4 with 1 MiB of second-level cache a core;
// docs/kernels/cpu-linear.md has the measurements.
#pragma once

#include <cstdint>

namespace infllm::cpu {

// Tokens whose accumulators are held in registers at once: 6 x 64 floats are 24 of the 32 AVX-512
// registers.
inline constexpr int kTileTokens = 6;

// Tokens up to which int8 codes are widened in registers; for more, a slice is widened to scratch
// and multiplied as bf16. At 6 the two look-up tables no longer fit beside the accumulators.
inline constexpr int kFusedTokens = 4;

// Inputs that are summed in registers before they are added to the running total. A slice of bf16
// weights is then 64 KiB. Runner-up 256: equal within the noise.
inline constexpr std::int64_t kBlockInputs = 512;

// Tokens and panels of one task of a prefill: 96 tokens of a block of activations and 8 panels of
// totals stay in the second-level cache. Runner-up 192 x 4: 0 to 10% slower, most at 16384 inputs.
inline constexpr std::int64_t kTaskTokens = 16 * kTileTokens;
inline constexpr std::int64_t kTaskPanels = 8;

}  // namespace infllm::cpu
