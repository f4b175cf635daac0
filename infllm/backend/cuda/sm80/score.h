// SPDX-License-Identifier: Apache-2.0
//
// Scores of all blocks on any GPU from Ampere on (score.h of ops says what is computed). bf16 or
// f16, head dimension 64 or 128, groups of up to 32 query heads; kUnsupported beyond. Workspace:
// the gathered pooled keys (pooled.h), 5/64 of the bytes of the context's keys.
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/score.h"

namespace infllm::cuda::sm80 {

Status score(const Backend& backend, const ScoreParams& params, std::span<std::byte> workspace);
std::size_t score_bytes(const Backend& backend, const ScoreParams& params);

}  // namespace infllm::cuda::sm80
