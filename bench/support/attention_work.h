// SPDX-License-Identifier: Apache-2.0
//
// Floating-point operations and bytes of attention, by the cost model of the paper's algorithm:
// every visible pooled key is scored, every visible selected key is attended to. What a kernel does
// beyond that (masked halves of tiles, a union of neighbours' blocks) does not count.
#pragma once

#include <algorithm>

#include "bench/support/attention_data.h"

namespace infllm::bench {

struct AttentionWork {  // floating-point operations
  double dense = 0;
  double select = 0;
  double attend = 0;

  double sparse() const { return select + attend; }
  // Keys that the token at position p attends to sparsely.
  static std::int64_t visible(const SparseConfig& config, std::int64_t p) {
    return config.selects_all_at(p)
               ? p + 1
               : (config.budget_blocks() - 1) * config.block_size + p % config.block_size + 1;
  }
  // The tokens at positions [first, last).
  void add(const AttentionShape& shape, const SparseConfig& config, std::int64_t first,
           std::int64_t last) {
    const double per_key = 2.0 * shape.head_dim * shape.heads_q;
    for (std::int64_t p = first; p < last; ++p) {
      dense += 2 * per_key * static_cast<double>(p + 1);
      attend += 2 * per_key * static_cast<double>(visible(config, p));
      select +=
          per_key * static_cast<double>(config.fine_windows(p + 1) + config.coarse_windows(p + 1));
    }
  }
};

// Bytes of one layer's cache that a token after `length` - 1 others reads, with elements of
// `element` bytes: keys and values of all, or of what is selected and the pooled keys.
struct DecodeBytes {
  double dense = 0;
  double sparse = 0;

  DecodeBytes(const AttentionShape& shape, const SparseConfig& config, std::int64_t length,
              double element) {
    const double row = element * shape.heads_kv * shape.head_dim;
    dense = 2 * row * static_cast<double>(length);
    const auto pooled =
        static_cast<double>(config.fine_windows(length) + config.coarse_windows(length));
    sparse = row * (2 * static_cast<double>(AttentionWork::visible(config, length - 1)) + pooled);
  }
};

}  // namespace infllm::bench
