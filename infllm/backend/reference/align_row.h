// SPDX-License-Identifier: Apache-2.0
//
// What align and its backward have in common: a row's place and choosable blocks, and the pooled
// keys that normalise its scores.
#pragma once

#include <algorithm>

#include "infllm/backend/reference/math.h"
#include "infllm/backend/reference/pages.h"
#include "infllm/ops/align.h"

namespace infllm::reference {

// log sum of exp(at(i)), i in [0, count), count > 0.
template <typename Real, typename At>
Real log_sum_exp(std::int64_t count, At&& at) {
  Real max = -std::numeric_limits<Real>::infinity();
  for (std::int64_t i = 0; i < count; ++i) max = std::max<Real>(max, at(i));
  Real sum = 0;
  for (std::int64_t i = 0; i < count; ++i) sum += std::exp(at(i) - max);
  return max + std::log(sum);
}

struct AlignRow {
  AlignRow(const AlignParams& p, std::int64_t r) : token(p.rows == nullptr ? r : p.rows[r]) {
    if (token < 0 || token >= p.batch.num_tokens) return;
    place = place_of(p.batch, token);
    visible = p.config.fine_windows(place.position + 1);
    first_block = p.config.init_blocks;
    end_block = std::max(first_block, p.config.first_local_block(place.position));
    // Blocks without a visible window come last.
    const auto is_seen = [&](std::int64_t b) {
      return std::max<std::int64_t>(0, p.config.first_window_of(b)) < visible;
    };
    while (end_block > first_block && !is_seen(end_block - 1)) --end_block;
  }

  std::int64_t token;
  Place place{.sequence = -1, .position = -1};  // of numbers that are no rows
  std::int64_t visible = 0;                     // fine windows
  std::int64_t first_block = 0;                 // F is first_block .. end_block - 1
  std::int64_t end_block = 0;
};

// The pooled keys visible to a row that N is taken over.
struct Normaliser {
  Normaliser(const AlignParams& p, const Pages& all, const AlignRow& row, std::int32_t kv_head)
      : pages(all),
        coarse(p.config.lse_source == LseSource::kCoarse),
        count(coarse ? p.config.coarse_windows(row.place.position + 1) : row.visible),
        sequence(row.place.sequence),
        group(kv_head) {}

  const double* key(std::int64_t m) const {
    return coarse ? pages.coarse(sequence, group, m) : pages.fine(sequence, group, m);
  }

  const Pages& pages;
  bool coarse;
  std::int64_t count;
  std::int32_t sequence;
  std::int32_t group;
};

}  // namespace infllm::reference
