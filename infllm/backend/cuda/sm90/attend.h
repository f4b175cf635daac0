// SPDX-License-Identifier: Apache-2.0
//
// Prefill attention on Hopper (ops/attend.h): TMA and wgmma. Group sizes 1, 2, 4 .. 64 dense, 4, 8
// .. 32 sparse; head dimensions 64 and 128; sequences of both kinds may share a batch. Workspace: a
// counter, and union lists of some tiles at a time (union.h), 128 MiB or what 2048 tiles take.
// docs/kernels/hopper-attend.md derives the shape.
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/attend.h"

namespace infllm::cuda::sm90 {

// Whether this kernel covers the call's shape.
bool attends(const AttendParams& params);

Status attend(const Backend& backend, const AttendParams& params, std::span<std::byte> workspace);
std::size_t attend_bytes(const Backend& backend, const AttendParams& params);

}  // namespace infllm::cuda::sm90
