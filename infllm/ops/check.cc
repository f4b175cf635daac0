// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/check.h"

#include <cmath>

namespace infllm {

Status check_cache(std::string_view step, const KvPages& pages, const Batch& batch) {
  const std::string context(step);
  INFLLM_TRY(check(pages.layout).with_context(context));
  INFLLM_TRY(check(batch).with_context(context));
  const std::int64_t blocks = pages.layout.config.blocks_in(batch.max_kv_length);
  if (blocks > batch.max_pages) {
    return invalid_argument(fmt::format(
        "{}: page_table has rows of {} pages, but max_kv_length = {} needs {} pages of {} tokens",
        step, batch.max_pages, batch.max_kv_length, blocks, pages.layout.config.block_size));
  }
  if (blocks > 0) INFLLM_TRY(check_pointer(step, "pages.data", pages.data));
  return {};
}

Status check_heads(std::string_view step, std::int32_t heads_q, std::int32_t heads_kv) {
  if (heads_q >= 1 && heads_kv >= 1 && heads_q % heads_kv == 0) return {};
  return invalid_argument(
      fmt::format("{}: {} query heads and {} KV heads, expected query heads in equal groups, one "
                  "group a KV head",
                  step, heads_q, heads_kv));
}

Status check_scale(std::string_view step, float scale) {
  if (std::isfinite(scale) && scale > 0) return {};
  return invalid_argument(
      fmt::format("{}: scale = {}, expected a positive number; usually head_dim to the power -1/2",
                  step, scale));
}

Status check_same_windows(std::string_view step, const SparseConfig& config,
                          const KvLayout& layout) {
  const SparseConfig& pages = layout.config;
  if (config.block_size == pages.block_size && config.kernel_size == pages.kernel_size &&
      config.kernel_stride == pages.kernel_stride) {
    return {};
  }
  return invalid_argument(fmt::format(
      "{}: the config has block_size, kernel_size, kernel_stride = {}, {}, {}, but the cache was "
      "laid out for {}, {}, {}; use one config for both",
      step, config.block_size, config.kernel_size, config.kernel_stride, pages.block_size,
      pages.kernel_size, pages.kernel_stride));
}

Status check_scoring(std::string_view step, const SparseConfig& config, const KvPages& pages,
                     const Batch& batch, std::int32_t heads_q, float scale) {
  INFLLM_TRY(check(config));
  INFLLM_TRY(check_cache(step, pages, batch));
  INFLLM_TRY(check_same_windows(step, config, pages.layout));
  INFLLM_TRY(check_heads(step, heads_q, pages.layout.kv_heads));
  INFLLM_TRY(check_scale(step, scale));
  if (pages.layout.pooled_keys) return {};
  return invalid_argument(
      fmt::format("{}: the cache has no pooled keys; lay it out with pooled_keys = true", step));
}

}  // namespace infllm
