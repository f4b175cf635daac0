// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/overlap.h"

#include <algorithm>
#include <iterator>
#include <vector>

namespace infllm {

double neighbours_overlap(const SparseConfig& config, std::span<const std::int32_t> selection,
                          std::int32_t heads_kv, std::int64_t tokens, std::int64_t columns,
                          std::int64_t length) {
  std::int64_t common = 0;
  std::int64_t total = 0;
  std::vector<std::int32_t> both;
  for (std::int64_t row = 1; row < heads_kv * tokens; ++row) {
    if (row % tokens == 0) continue;  // another head
    // Freely chosen blocks lie between the first and the local ones; -1 is behind everything.
    const std::int64_t local = config.first_local_block(length - tokens + row % tokens);
    const auto free = [&](std::int64_t r) {
      const auto* begin = selection.data() + r * columns;
      const auto* end = std::find(begin, begin + columns, -1);
      const auto* first = std::min(begin + config.init_blocks, end);
      return std::span(first, std::lower_bound(first, end, local));
    };
    both.clear();
    std::ranges::set_intersection(free(row - 1), free(row), std::back_inserter(both));
    common += static_cast<std::int64_t>(both.size());
    total += static_cast<std::int64_t>(free(row).size());
  }
  return total == 0 ? 1.0 : static_cast<double>(common) / static_cast<double>(total);
}

}  // namespace infllm
