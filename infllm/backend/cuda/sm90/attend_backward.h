// SPDX-License-Identifier: Apache-2.0
//
// Gradients of attention on Hopper (attend_backward of ops/attend.h): TMA and wgmma. Group sizes 2,
// 4 .. 64 dense, to 32 sparse (2: dQ by the kernel for any device); head dimensions 64 and 128;
// sequences of both kinds may share a batch. Deterministic: every sum has one owner, or is added up
// in a fixed order. docs/kernels/hopper-backward.md derives the shape.
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/attend.h"

namespace infllm::cuda::sm90 {

// Whether these kernels cover the call's shape.
bool attends_backward(const AttendBackwardParams& params);

Status attend_backward(const Backend& backend, const AttendBackwardParams& params,
                       std::span<std::byte> workspace);
std::size_t attend_backward_bytes(const Backend& backend, const AttendBackwardParams& params);

}  // namespace infllm::cuda::sm90
