// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/score_select.h"

#include "infllm/ops/check.h"

namespace infllm {

bool has_score_select(const Backend& backend, const ScoreSelectParams& params) {
  const Cell<ScoreSelectParams>& cell = backend.kernels->score_select;
  return cell.run != nullptr && (cell.covers == nullptr || cell.covers(backend, params));
}

Status score_select(const Backend& backend, const ScoreSelectParams& params,
                    std::span<std::byte> workspace) {
  const ScoreParams& p = params.score;
  INFLLM_TRY(check(p.config));
  INFLLM_TRY(check_cache("score_select", p.pages, p.batch));
  INFLLM_TRY(check_same_windows("score_select", p.config, p.pages.layout));
  INFLLM_TRY(check_heads("score_select", p.heads_q, p.pages.layout.kv_heads));
  INFLLM_TRY(check_scale("score_select", p.scale));
  if (!p.pages.layout.pooled_keys) {
    return invalid_argument(
        "score_select: the cache has no pooled keys; lay it out with pooled_keys = true");
  }
  if (params.select.heads_kv != p.pages.layout.kv_heads) {
    return invalid_argument(
        fmt::format("score_select: {} KV heads to select for, but {} in the "
                    "cache",
                    params.select.heads_kv, p.pages.layout.kv_heads));
  }
  if (p.batch.num_tokens == 0 || !p.batch.any_sparse) return {};
  INFLLM_TRY(check_pointer("score_select", "q", p.q));
  INFLLM_TRY(check_pointer("score_select", "selection", params.select.selection));
  return run_cell("score_select", backend, backend.kernels->score_select, params, workspace);
}

std::size_t score_select_workspace_bytes(const Backend& backend, const ScoreSelectParams& params) {
  return cell_workspace_bytes(backend, backend.kernels->score_select, params);
}

}  // namespace infllm
