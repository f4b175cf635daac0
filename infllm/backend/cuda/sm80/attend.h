// SPDX-License-Identifier: Apache-2.0
//
// Dense causal and sparse attention of prefill on any GPU from Ampere on (attend.h of ops says what
// is computed). bf16 or f16, head dimension 64 or 128, groups of up to 128 query heads;
// kUnsupported beyond. Workspace: the union lists of tiles of up to 32 tokens (union_lists.h); none
// if dense.
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/attend.h"

namespace infllm::cuda::sm80 {

Status attend(const Backend& backend, const AttendParams& params, std::span<std::byte> workspace);
std::size_t attend_bytes(const Backend& backend, const AttendParams& params);

}  // namespace infllm::cuda::sm80
