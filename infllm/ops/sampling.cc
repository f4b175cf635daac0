// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/sampling.h"

#include <limits>

#include "infllm/ops/check.h"

namespace infllm {

Status top_logits(const Backend& backend, const TopLogitsParams& params,
                  std::span<std::byte> workspace) {
  constexpr std::int64_t kLargest = std::numeric_limits<std::int32_t>::max();
  if (params.rows < 0 || params.vocabulary < 1 || params.vocabulary > kLargest) {
    return invalid_argument(
        fmt::format("top_logits: {} rows of {} logits, expected at least 0 rows of 1 to {}",
                    params.rows, params.vocabulary, kLargest));
  }
  if (params.rows == 0) return {};
  INFLLM_TRY(check_pointer("top_logits", "logits", params.logits));
  INFLLM_TRY(check_pointer("top_logits", "temperatures", params.temperatures));
  INFLLM_TRY(check_pointer("top_logits", "out", params.out));
  return run_cell("top_logits", backend, backend.kernels->top_logits, params, workspace);
}

std::size_t top_logits_workspace_bytes(const Backend& backend, const TopLogitsParams& params) {
  return cell_workspace_bytes(backend, backend.kernels->top_logits, params);
}

}  // namespace infllm
