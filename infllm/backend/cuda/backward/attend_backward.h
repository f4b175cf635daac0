// SPDX-License-Identifier: Apache-2.0
//
// Gradients of dense and sparse attention on any GPU from Ampere on (attend.h of ops says what is
// computed). bf16 or f16, head dimension 64 or 128, groups of up to 128 query heads; kUnsupported
// beyond. Deterministic: no sum is taken by atomics, so repeats agree bit by bit.
// docs/kernels/backward.md derives the shape and states the workspace.
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/attend.h"

namespace infllm::cuda::backward {

Status attend_backward(const Backend& backend, const AttendBackwardParams& params,
                       std::span<std::byte> workspace);
std::size_t attend_backward_bytes(const Backend& backend, const AttendBackwardParams& params);

}  // namespace infllm::cuda::backward
