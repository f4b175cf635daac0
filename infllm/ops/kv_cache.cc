// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/kv_cache.h"

#include "infllm/ops/check.h"

namespace infllm {

Status check(const KvLayout& layout) {
  if (layout.kv_heads < 1 || layout.head_dim < 1 || layout.head_dim > 65536) {
    return invalid_argument(
        fmt::format("kv_cache: {} KV heads of dimension {}, expected at least 1 head of 1 to 65536",
                    layout.kv_heads, layout.head_dim));
  }
  if (layout.dtype != DType::kF64 && layout.dtype != DType::kF32 && layout.dtype != DType::kBF16 &&
      layout.dtype != DType::kF16) {
    return invalid_argument(
        fmt::format("kv_cache: keys and values of type {}, expected f64, f32, bf16 or f16",
                    name_of(layout.dtype)));
  }
  return check(layout.config);
}

Status check(const Backend& backend, const KvLayout& layout) {
  INFLLM_TRY(check(layout));
  const Kernels& kernels = *backend.kernels;
  if (kernels.kv_page_bytes == nullptr) {
    return unsupported(
        fmt::format("kv_cache: the device \"{}\" keeps no cache; open another one", backend.name));
  }
  return kernels.check_layout == nullptr ? Status() : kernels.check_layout(layout);
}

std::int64_t kv_page_bytes(const Backend& backend, const KvLayout& layout) {
  INFLLM_CHECK(backend.kernels->kv_page_bytes != nullptr, "check the layout first");
  return backend.kernels->kv_page_bytes(layout);
}

Status kv_append(const Backend& backend, const KvAppendParams& params) {
  INFLLM_TRY(check_cache("kv_append", params.pages, params.batch));
  if (params.batch.num_tokens == 0) return {};
  INFLLM_TRY(check_pointer("kv_append", "k", params.k));
  INFLLM_TRY(check_pointer("kv_append", "v", params.v));
  if (params.pages.layout.score_keys()) {
    INFLLM_TRY(check_pointer("kv_append", "k_score (use_nope)", params.k_score));
  }
  return run_cell("kv_append", backend, backend.kernels->kv_append, params, {});
}

Status kv_read(const Backend& backend, const KvReadParams& params) {
  INFLLM_TRY(check_cache("kv_read", params.pages, params.batch));
  if ((params.fine != nullptr || params.coarse != nullptr) && !params.pages.layout.pooled_keys) {
    return invalid_argument(
        "kv_read: pooled keys of a cache that has none; lay it out with pooled_keys = true");
  }
  return run_cell("kv_read", backend, backend.kernels->kv_read, params, {});
}

}  // namespace infllm
