// SPDX-License-Identifier: Apache-2.0
//
// Score and select in one kernel for steps of more than one token, on Hopper (ops/score_select.h
// says what it computes, docs/kernels/hopper-score-select.md how). Workspace: the gathered pooled
// keys, 5/64 of the bytes of the context's keys; nothing grows with the tokens of the step.
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/score_select.h"

namespace infllm::cuda::sm90 {

// Groups of 2, 4, 8 and 16 heads (2 only with rounded scores), head_dim 64 and 128, up to 128
// freely chosen blocks of up to 65535.
bool score_selects(const Backend& backend, const ScoreSelectParams& params);

Status score_select(const Backend& backend, const ScoreSelectParams& params,
                    std::span<std::byte> workspace);
std::size_t score_select_bytes(const Backend& backend, const ScoreSelectParams& params);

}  // namespace infllm::cuda::sm90
