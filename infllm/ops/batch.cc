// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/batch.h"

#include <fmt/format.h>

#include <algorithm>

namespace infllm {

Status check(const Batch& b) {
  if (b.num_sequences < 0 || b.num_tokens < 0 || b.max_pages < 0) {
    return invalid_argument(fmt::format(
        "batch: {} sequences, {} tokens and rows of {} pages, expected none to be negative",
        b.num_sequences, b.num_tokens, b.max_pages));
  }
  if (b.max_query_length < 0 || b.max_query_length > b.num_tokens ||
      b.max_kv_length < b.max_query_length) {
    return invalid_argument(fmt::format(
        "batch: max_query_length = {} and max_kv_length = {} for {} tokens; expected 0 <= "
        "max_query_length <= tokens and max_query_length <= max_kv_length",
        b.max_query_length, b.max_kv_length, b.num_tokens));
  }
  if (b.num_tokens > 0 && b.max_query_length == 0) {
    return invalid_argument(fmt::format(
        "batch: max_query_length = 0 with {} tokens; set it to the longest sequence's share",
        b.num_tokens));
  }
  if (b.num_sequences > 0 && (b.query_start == nullptr || b.kv_length == nullptr)) {
    return invalid_argument("batch: query_start and kv_length must not be null");
  }
  if (b.num_sequences > 0 && b.max_pages > 0 && b.page_table == nullptr) {
    return invalid_argument("batch: page_table is null, expected [num_sequences, max_pages]");
  }
  if (b.any_sparse && b.sparse == nullptr) {
    return invalid_argument("batch: any_sparse is set, but sparse is null");
  }
  return {};
}

Status check_contents(const Batch& b, std::int32_t page_tokens, std::int32_t num_pages) {
  INFLLM_TRY(check(b));
  if (page_tokens < 1) {
    return invalid_argument(
        fmt::format("batch: pages of {} tokens, expected at least 1", page_tokens));
  }
  std::int32_t longest_query = 0;
  std::int32_t longest_kv = 0;
  bool any_sparse = false;
  if (b.num_sequences > 0 && b.query_start[0] != 0) {
    return invalid_argument(
        fmt::format("batch: query_start[0] = {}, expected 0", b.query_start[0]));
  }
  for (std::int32_t s = 0; s < b.num_sequences; ++s) {
    const std::int64_t query = std::int64_t{b.query_start[s + 1]} - b.query_start[s];
    if (query < 0) {
      return invalid_argument(
          fmt::format("batch: query_start falls from {} to {} at sequence {}; expected it to rise",
                      b.query_start[s], b.query_start[s + 1], s));
    }
    if (b.kv_length[s] < query) {
      return invalid_argument(
          fmt::format("batch: sequence {} has {} keys but {} new tokens; kv_length counts them too",
                      s, b.kv_length[s], query));
    }
    const std::int64_t pages = (std::int64_t{b.kv_length[s]} + page_tokens - 1) / page_tokens;
    if (pages > b.max_pages) {
      return invalid_argument(fmt::format(
          "batch: sequence {} has {} keys and needs {} pages, but page_table rows have {}", s,
          b.kv_length[s], pages, b.max_pages));
    }
    for (std::int64_t i = 0; i < pages; ++i) {
      const std::int32_t page = b.page_table[std::int64_t{s} * b.max_pages + i];
      if (page < 0 || page >= num_pages) {
        return invalid_argument(
            fmt::format("batch: sequence {} has page {} at block {}, expected 0 to {}", s, page, i,
                        num_pages - 1));
      }
    }
    longest_query = std::max(longest_query, static_cast<std::int32_t>(query));
    longest_kv = std::max(longest_kv, b.kv_length[s]);
    any_sparse |= b.sparse != nullptr && b.sparse[s] != 0;
  }
  const std::int32_t tokens = b.num_sequences > 0 ? b.query_start[b.num_sequences] : 0;
  if (tokens != b.num_tokens) {
    return invalid_argument(
        fmt::format("batch: num_tokens = {}, but query_start ends at {}", b.num_tokens, tokens));
  }
  if (longest_query != b.max_query_length || longest_kv > b.max_kv_length) {
    return invalid_argument(fmt::format(
        "batch: max_query_length = {} and max_kv_length = {}, but the longest are {} and {}",
        b.max_query_length, b.max_kv_length, longest_query, longest_kv));
  }
  if (any_sparse != b.any_sparse) {
    return invalid_argument(
        fmt::format("batch: any_sparse = {}, but sparse[] says {}", b.any_sparse, any_sparse));
  }
  return {};
}

}  // namespace infllm
