// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/score.h"

#include "infllm/ops/check.h"

namespace infllm {

Status score(const Backend& backend, const ScoreParams& params, std::span<std::byte> workspace) {
  INFLLM_TRY(check(params.config));
  INFLLM_TRY(check_cache("score", params.pages, params.batch));
  INFLLM_TRY(check_same_windows("score", params.config, params.pages.layout));
  INFLLM_TRY(check_heads("score", params.heads_q, params.pages.layout.kv_heads));
  INFLLM_TRY(check_scale("score", params.scale));
  if (!params.pages.layout.pooled_keys) {
    return invalid_argument(
        "score: the cache has no pooled keys; lay it out with pooled_keys = true");
  }
  if (params.batch.num_tokens == 0 || !params.batch.any_sparse) return {};
  INFLLM_TRY(check_pointer("score", "q", params.q));
  INFLLM_TRY(check_pointer("score", "scores", params.scores));
  return run_cell("score", backend, backend.kernels->score, params, workspace);
}

std::size_t score_workspace_bytes(const Backend& backend, const ScoreParams& params) {
  return cell_workspace_bytes(backend, backend.kernels->score, params);
}

}  // namespace infllm
