// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/select_attend.h"

#include "infllm/ops/check.h"

namespace infllm {

bool has_select_attend(const Backend& backend, const SelectAttendParams& params) {
  const Cell<SelectAttendParams>& cell = backend.kernels->select_attend;
  return cell.run != nullptr && (cell.covers == nullptr || cell.covers(backend, params));
}

Status select_attend(const Backend& backend, const SelectAttendParams& params,
                     std::span<std::byte> workspace) {
  const ScoreParams& score = params.choose.score;
  const AttendParams& p = params.attend;
  INFLLM_TRY(
      check_scoring("select_attend", score.config, p.pages, p.batch, p.heads_q, score.scale));
  INFLLM_TRY(check_scale("select_attend", p.scale));
  if (p.batch.num_tokens == 0) return {};
  INFLLM_TRY(check_pointer("select_attend", "q", p.q));
  INFLLM_TRY(check_pointer("select_attend", "q (to score with)", score.q));
  INFLLM_TRY(check_pointer("select_attend", "o", p.o));
  INFLLM_TRY(check_pointer("select_attend", "selection", params.choose.select.selection));
  return run_cell("select_attend", backend, backend.kernels->select_attend, params, workspace);
}

std::size_t select_attend_workspace_bytes(const Backend& backend,
                                          const SelectAttendParams& params) {
  return cell_workspace_bytes(backend, backend.kernels->select_attend, params);
}

}  // namespace infllm
