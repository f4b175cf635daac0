// SPDX-License-Identifier: Apache-2.0
//
// Steps 2 and 3 in one: from queries and pooled keys to chosen blocks (ops/score.h, ops/select.h
// say what they are). A column that has this step keeps the scores of a token on the chip, so that
// no array of one number for every token and block is ever in memory. The result is the same
// selection.
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/score.h"
#include "infllm/ops/select.h"

namespace infllm {

struct ScoreSelectParams {
  ScoreParams score;    // scores is not used and may be null
  SelectParams select;  // scores is not used and may be null
};

// Whether the backend has this step for parameters of this shape; if not, run score() and select().
bool has_score_select(const Backend& backend, const ScoreSelectParams& params);

Status score_select(const Backend& backend, const ScoreSelectParams& params,
                    std::span<std::byte> workspace);
std::size_t score_select_workspace_bytes(const Backend& backend, const ScoreSelectParams& params);

}  // namespace infllm
