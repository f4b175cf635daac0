// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/sparse_config.h"

#include <fmt/format.h>

namespace infllm {
namespace {

// Far above any use, and small enough that four of them, or one times a head dimension, fit 32
// bits.
constexpr std::int32_t kMaxTokens = 1 << 24;

Status in_range(const char* name, std::int32_t value, std::int32_t low, std::int32_t high) {
  if (value >= low && value <= high) return {};
  return invalid_argument(
      fmt::format("sparse_config: {} = {}, expected {} to {}", name, value, low, high));
}

Status divisible(const char* name, std::int32_t value, const char* divisor_name,
                 std::int32_t divisor, const char* reason) {
  if (value % divisor == 0) return {};
  return invalid_argument(fmt::format("sparse_config: {} = {}, expected a multiple of {} = {}: {}",
                                      name, value, divisor_name, divisor, reason));
}

}  // namespace

Status check(const SparseConfig& c) {
  INFLLM_TRY(in_range("kernel_stride", c.kernel_stride, 1, kMaxTokens / 4));
  INFLLM_TRY(in_range("kernel_size", c.kernel_size, c.kernel_stride, kMaxTokens / 4));
  INFLLM_TRY(in_range("block_size", c.block_size, 1, kMaxTokens));
  INFLLM_TRY(in_range("init_blocks", c.init_blocks, 0, kMaxTokens));
  INFLLM_TRY(in_range("window_size", c.window_size, 0, kMaxTokens));
  INFLLM_TRY(in_range("topk", c.topk, 1, kMaxTokens));
  INFLLM_TRY(in_range("dense_len", c.dense_len, -1, INT32_MAX));
  INFLLM_TRY(divisible("kernel_size", c.kernel_size, "kernel_stride", c.kernel_stride,
                       "a block is overlapped by a whole number of windows"));
  INFLLM_TRY(divisible("block_size", c.block_size, "4 * kernel_stride", c.coarse_stride(),
                       "pooled keys are kept in the page where their window begins"));
  INFLLM_TRY(divisible("window_size", c.window_size, "block_size", c.block_size,
                       "the local window is made of whole blocks"));
  if (c.legacy_window && c.window_size == 0) {
    return invalid_argument(
        "sparse_config: window_size = 0 with legacy_window, where the window includes the query's "
        "own block; expected at least block_size");
  }
  return {};
}

}  // namespace infllm
