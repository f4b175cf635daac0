// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/attend.h"

#include "infllm/ops/check.h"

namespace infllm {
namespace {

Status check_forward(std::string_view step, const AttendParams& p) {
  INFLLM_TRY(check_cache(step, p.pages, p.batch));
  INFLLM_TRY(check_heads(step, p.heads_q, p.pages.layout.kv_heads));
  INFLLM_TRY(check_scale(step, p.scale));
  if (p.batch.num_tokens == 0) return {};
  if (p.selection != nullptr && p.columns < 1) {
    return invalid_argument(
        fmt::format("{}: a selection of {} columns, expected at least 1; pass null to attend to "
                    "every block",
                    step, p.columns));
  }
  if (p.selection == nullptr && p.columns != 0) {
    return invalid_argument(
        fmt::format("{}: {} columns without a selection, expected 0", step, p.columns));
  }
  INFLLM_TRY(check_pointer(step, "q", p.q));
  return check_pointer(step, "o", p.o);
}

}  // namespace

Status attend(const Backend& backend, const AttendParams& params, std::span<std::byte> workspace) {
  INFLLM_TRY(check_forward("attend", params));
  if (params.batch.num_tokens == 0) return {};
  return run_cell("attend", backend, backend.kernels->attend, params, workspace);
}

std::size_t attend_workspace_bytes(const Backend& backend, const AttendParams& params) {
  return cell_workspace_bytes(backend, backend.kernels->attend, params);
}

Status attend_backward(const Backend& backend, const AttendBackwardParams& params,
                       std::span<std::byte> workspace) {
  constexpr const char* kStep = "attend_backward";
  INFLLM_TRY(check_forward(kStep, params.forward));
  if (params.forward.batch.num_tokens > 0) {
    INFLLM_TRY(check_pointer(kStep, "lse (of the forward pass)", params.forward.lse));
    INFLLM_TRY(check_pointer(kStep, "grad_o", params.grad_o));
    INFLLM_TRY(check_pointer(kStep, "grad_q", params.grad_q));
  }
  if (params.forward.batch.max_kv_length > 0) {
    INFLLM_TRY(check_pointer(kStep, "grad_k", params.grad_k));
    INFLLM_TRY(check_pointer(kStep, "grad_v", params.grad_v));
  }
  return run_cell(kStep, backend, backend.kernels->attend_backward, params, workspace);
}

std::size_t attend_backward_workspace_bytes(const Backend& backend,
                                            const AttendBackwardParams& params) {
  return cell_workspace_bytes(backend, backend.kernels->attend_backward, params);
}

}  // namespace infllm
