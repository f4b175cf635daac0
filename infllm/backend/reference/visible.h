// SPDX-License-Identifier: Apache-2.0
//
// Vis(p, g): the positions that a token attends to (spec section 7), for attend and its backward.
#pragma once

#include <algorithm>

#include "infllm/backend/reference/pages.h"
#include "infllm/ops/attend.h"

namespace infllm::reference {

// Writes the positions in ascending order and returns how many there are.
inline std::int64_t visible_positions(const AttendParams& p, Place place, std::int64_t token,
                                      std::int32_t group, std::int32_t* positions) {
  std::int64_t count = 0;
  const auto add = [&](std::int64_t first, std::int64_t end) {
    for (std::int64_t t = first; t < std::min(end, place.position + 1); ++t) {
      positions[count++] = static_cast<std::int32_t>(t);
    }
  };
  if (p.selection == nullptr || !is_sparse(p.batch, place.sequence)) {
    add(0, place.position + 1);
    return count;
  }
  const std::int64_t block = p.pages.layout.config.block_size;
  const std::int32_t* chosen =
      p.selection + (std::int64_t{group} * p.batch.num_tokens + token) * p.columns;
  for (std::int32_t i = 0; i < p.columns && chosen[i] >= 0; ++i) {
    add(chosen[i] * block, (chosen[i] + 1) * block);
  }
  return count;
}

}  // namespace infllm::reference
