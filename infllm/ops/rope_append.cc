// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/rope_append.h"

#include <fmt/format.h>

#include "infllm/ops/check.h"
#include "infllm/ops/kernels.h"

namespace infllm {

bool has_rope_append(const Backend& backend) { return backend.kernels->rope_append.run != nullptr; }

bool rope_append_pools(const Backend& backend, const RopeAppendParams& params) {
  const Cell<RopeAppendParams>& cell = backend.kernels->rope_append;
  return cell.covers != nullptr && cell.covers(backend, params);
}

Status rope_append(const Backend& backend, const RopeAppendParams& params) {
  INFLLM_TRY(check_cache("rope_append", params.pages, params.batch));
  INFLLM_TRY(check_heads("rope_append", params.heads_q, params.pages.layout.kv_heads));
  if (params.batch.num_tokens == 0) return {};
  INFLLM_TRY(check_pointer("rope_append", "qkv", params.qkv));
  INFLLM_TRY(check_pointer("rope_append", "cos", params.cos));
  INFLLM_TRY(check_pointer("rope_append", "sin", params.sin));
  INFLLM_TRY(check_pointer("rope_append", "q", params.q));
  if (params.pages.layout.score_keys()) {
    INFLLM_TRY(check_pointer("rope_append", "q_score (use_nope)", params.q_score));
  }
  if (params.pool && !rope_append_pools(backend, params)) {
    return unsupported(fmt::format(
        "rope_append: \"{}\" does not pool keys of this step too; call compress() after it",
        backend.name));
  }
  return run_cell("rope_append", backend, backend.kernels->rope_append, params, {});
}

}  // namespace infllm
