// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "infllm/backend/reference/math.h"
#include "infllm/backend/reference/pages.h"
#include "infllm/backend/reference/rows.h"

namespace infllm::reference {
namespace {

// The order in which blocks are chosen for one token.
class Preference {
 public:
  Preference(const SparseConfig& config, std::int64_t position, const double* scores)
      : config_(config),
        own_(position / config.block_size),
        first_local_(config.first_local_block(position)),
        scores_(scores) {}

  bool better(std::int64_t a, std::int64_t b) const {
    const std::int64_t rank_a = forced_rank(a);
    const std::int64_t rank_b = forced_rank(b);
    if (rank_a != rank_b) return rank_a < rank_b;
    const double score_a = score(a);
    const double score_b = score(b);
    return score_a != score_b ? score_a > score_b : a < b;
  }

 private:
  // The own block, the local window from near to far, the sink from the start, everything else.
  std::int64_t forced_rank(std::int64_t b) const {
    const std::int64_t locals = own_ - first_local_ + 1;
    if (b >= first_local_) return own_ - b;
    return b < config_.init_blocks ? locals + b : locals + config_.init_blocks;
  }
  double score(std::int64_t b) const { return std::isnan(scores_[b]) ? -kInfinity : scores_[b]; }

  const SparseConfig& config_;
  std::int64_t own_, first_local_;
  const double* scores_;
};

}  // namespace

Status select(const Backend& backend, const SelectParams& p, Workspace) {
  const std::int64_t blocks = p.blocks();
  const std::int64_t columns = p.columns();
  backend.pool->parallel_for(p.batch.num_tokens, [&](std::int64_t token, int) {
    const Place place = place_of(p.batch, token);
    if (!is_sparse(p.batch, place.sequence)) return;
    const std::int64_t candidates = place.position / p.config.block_size + 1;
    for (std::int32_t group = 0; group < p.heads_kv; ++group) {
      const std::int64_t row = std::int64_t{group} * p.batch.num_tokens + token;
      const Preference preference(p.config, place.position,
                                  static_cast<const double*>(p.scores) + row * blocks);
      // Keep the best `columns` seen so far, best first.
      std::int32_t* chosen = p.selection + row * columns;
      std::int64_t count = 0;
      for (std::int32_t b = 0; b < candidates; ++b) {
        if (count == columns && !preference.better(b, chosen[count - 1])) continue;
        std::int64_t at = count < columns ? count++ : count - 1;
        for (; at > 0 && preference.better(b, chosen[at - 1]); --at) chosen[at] = chosen[at - 1];
        chosen[at] = b;
      }
      std::sort(chosen, chosen + count);
      std::fill(chosen + count, chosen + columns, -1);
    }
  });
  return {};
}

}  // namespace infllm::reference
