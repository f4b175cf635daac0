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
  INFLLM_TRY(check_scoring("score_select", p.config, p.pages, p.batch, p.heads_q, p.scale));
  if (params.select.heads_kv != p.pages.layout.kv_heads) {
    return invalid_argument(
        fmt::format("score_select: {} KV heads to select for, but {} in the cache",
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
