// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/rope_append.h"

#include "infllm/ops/check.h"

namespace infllm {

bool has_rope_append(const Backend& backend) { return backend.kernels->rope_append.run != nullptr; }

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
  return run_cell("rope_append", backend, backend.kernels->rope_append, params, {});
}

}  // namespace infllm
