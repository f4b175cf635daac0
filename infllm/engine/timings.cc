// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/timings.h"

#include <algorithm>

namespace infllm::engine {

void Visibility::add(std::int32_t from, std::int32_t to, const SparseConfig* sparse) {
  for (std::int64_t p = from; p < to; ++p) {
    const std::int64_t keys = p + 1;
    causal += static_cast<double>(keys);
    if (sparse == nullptr) {
      attended += static_cast<double>(keys);
      continue;
    }
    const std::int64_t blocks =
        std::min<std::int64_t>(sparse->budget_blocks(), sparse->blocks_in(keys));
    const std::int64_t in_own_block = p % sparse->block_size + 1;
    attended += static_cast<double>((blocks - 1) * sparse->block_size + in_own_block);
  }
}

void accumulate(const model::ForwardTimes& times, model::ForwardTimes& into) {
  into.attention.compress += times.attention.compress;
  into.attention.score += times.attention.score;
  into.attention.select += times.attention.select;
  into.attention.attend += times.attention.attend;
  into.embed += times.embed;
  into.norm += times.norm;
  into.projections += times.projections;
  into.rope += times.rope;
  into.cache += times.cache;
  into.mlp += times.mlp;
  into.head += times.head;
}

}  // namespace infllm::engine
