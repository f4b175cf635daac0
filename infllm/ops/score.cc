// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/score.h"

#include "infllm/ops/check.h"

namespace infllm {

Status score(const Backend& backend, const ScoreParams& params, std::span<std::byte> workspace) {
  INFLLM_TRY(check_scoring("score", params.config, params.pages, params.batch, params.heads_q,
                           params.scale));
  if (params.batch.num_tokens == 0 || !params.batch.any_sparse) return {};
  INFLLM_TRY(check_pointer("score", "q", params.q));
  INFLLM_TRY(check_pointer("score", "scores", params.scores));
  return run_cell("score", backend, backend.kernels->score, params, workspace);
}

std::size_t score_workspace_bytes(const Backend& backend, const ScoreParams& params) {
  return cell_workspace_bytes(backend, backend.kernels->score, params);
}

}  // namespace infllm
