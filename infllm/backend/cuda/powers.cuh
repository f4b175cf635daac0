// SPDX-License-Identifier: Apache-2.0
//
// Soft-max by powers of two, of which the hardware makes one in one instruction (fast_exp2). With
// raw products x = q . k and c = exponent_of(scale),
//
//   exp(scale x - LSE) = 2^(c x - LSE log2(e))
//
// so kernels keep maxima and logarithms of sums in base 2, and LSE goes in and out in natural
// units.
#pragma once

#include "infllm/backend/cuda/tile/control.cuh"

namespace infllm::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
// Where a running maximum begins: finite, so that no difference of maxima is undefined.
inline constexpr float kNoMaximum = -1e30f;

// c of the above, the same one for every kernel of a call and for the way back.
inline float exponent_of(float scale) { return scale * kLog2E; }

}  // namespace infllm::cuda
