// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/select.h"

#include "infllm/ops/check.h"

namespace infllm {

Status select(const Backend& backend, const SelectParams& params) {
  INFLLM_TRY(check(params.config));
  INFLLM_TRY(check(params.batch).with_context("select"));
  if (params.heads_kv < 1) {
    return invalid_argument(
        fmt::format("select: {} KV heads, expected at least 1", params.heads_kv));
  }
  if (params.batch.num_tokens == 0 || !params.batch.any_sparse) return {};
  INFLLM_TRY(check_pointer("select", "scores", params.scores));
  INFLLM_TRY(check_pointer("select", "selection", params.selection));
  return run_cell("select", backend, backend.kernels->select, params, {});
}

}  // namespace infllm
