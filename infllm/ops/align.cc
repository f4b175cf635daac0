// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/align.h"

#include "infllm/ops/check.h"

namespace infllm {
namespace {

Status check_forward(std::string_view step, const AlignParams& p) {
  INFLLM_TRY(check_scoring(step, p.config, p.pages, p.batch, p.heads_q, p.scale));
  if (p.num_rows < 0 || (p.rows == nullptr && p.num_rows != p.batch.num_tokens)) {
    return invalid_argument(
        fmt::format("{}: {} rows without a list of them, expected num_rows = {}, all tokens of the "
                    "batch, or a list",
                    step, p.num_rows, p.batch.num_tokens));
  }
  if (p.num_rows == 0) return {};
  INFLLM_TRY(check_pointer(step, "q", p.q));
  if (p.config.use_nope) INFLLM_TRY(check_pointer(step, "q_score (use_nope)", p.q_score));
  INFLLM_TRY(check_pointer(step, "norms", p.norms));
  INFLLM_TRY(check_pointer(step, "grad_scores", p.grad_scores));
  return check_pointer(step, "windows", p.windows);
}

}  // namespace

Status align(const Backend& backend, const AlignParams& params, std::span<std::byte> workspace) {
  INFLLM_TRY(check_forward("align", params));
  if (params.num_rows == 0) return {};
  INFLLM_TRY(check_pointer("align", "loss", params.loss));
  return run_cell("align", backend, backend.kernels->align, params, workspace);
}

std::size_t align_workspace_bytes(const Backend& backend, const AlignParams& params) {
  return cell_workspace_bytes(backend, backend.kernels->align, params);
}

Status align_backward(const Backend& backend, const AlignBackwardParams& params,
                      std::span<std::byte> workspace) {
  constexpr const char* kStep = "align_backward";
  INFLLM_TRY(check_forward(kStep, params.forward));
  if (params.forward.num_rows > 0) {
    INFLLM_TRY(check_pointer(kStep, "grad_loss", params.grad_loss));
    INFLLM_TRY(check_pointer(kStep, "grad_q", params.grad_q));
  }
  if (params.forward.batch.max_kv_length == 0) return {};
  INFLLM_TRY(check_pointer(kStep, "grad_k", params.grad_k));
  return run_cell(kStep, backend, backend.kernels->align_backward, params, workspace);
}

std::size_t align_backward_workspace_bytes(const Backend& backend,
                                           const AlignBackwardParams& params) {
  return cell_workspace_bytes(backend, backend.kernels->align_backward, params);
}

}  // namespace infllm
