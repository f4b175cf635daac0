// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/reference/math.h"
#include "infllm/backend/reference/pages.h"
#include "infllm/backend/reference/rows.h"
#include "infllm/core/arena.h"

namespace infllm::reference {
namespace {

// What one worker needs to score a token.
template <typename Real>
struct Scratch {
  Real* logits;  // [windows of the longest sequence]
  Real* sums;    // [windows of the longest sequence], S
  Real* q;       // [D], rounded
};

template <typename Real>
class Scorer {
 public:
  Scorer(const Backend& backend, const ScoreParams& p)
      : p_(p), pages_(p.pages, p.batch), operand_(rounding_of(backend).operand) {}

  // S[j] = sum over the group's heads of P_h[j], for the windows visible to the token.
  void sum_heads(Place place, std::int64_t token, std::int32_t group, Scratch<Real> scratch) const {
    const SparseConfig& config = p_.config;
    const std::int64_t fine = config.fine_windows(place.position + 1);
    const std::int64_t coarse = config.coarse_windows(place.position + 1);
    const std::int32_t heads = p_.heads_q / p_.pages.layout.kv_heads;
    const std::int64_t dim = p_.pages.layout.head_dim;
    for (std::int64_t j = 0; j < fine; ++j) scratch.sums[j] = 0;
    const bool from_coarse = config.lse_source == LseSource::kCoarse;
    if ((from_coarse ? coarse : fine) == 0) return;  // nothing to normalise by: all scores are 0

    for (std::int32_t h = group * heads; h < (group + 1) * heads; ++h) {
      const double* q = static_cast<const double*>(p_.q) + (token * p_.heads_q + h) * dim;
      round_row(q, dim, operand_, scratch.q);
      const auto logit = [&](const double* key) {
        return static_cast<Real>(p_.scale) * dot<Real>(scratch.q, key, dim);
      };
      const std::int64_t count = from_coarse ? coarse : fine;
      for (std::int64_t m = 0; m < count; ++m) {
        scratch.logits[m] = logit(from_coarse ? pages_.coarse(place.sequence, group, m)
                                              : pages_.fine(place.sequence, group, m));
      }
      const Softmax<Real> norm = exponentiate(scratch.logits, count);
      for (std::int64_t j = 0; j < fine; ++j) {
        scratch.sums[j] +=
            std::exp(logit(pages_.fine(place.sequence, group, j)) - norm.max) / norm.sum;
      }
    }
  }

  // R[b] for all blocks b up to the token's own, and -inf after it.
  void score_blocks(Place place, std::int64_t token, std::int32_t group,
                    Scratch<Real> scratch) const {
    const SparseConfig& config = p_.config;
    const std::int64_t blocks = config.blocks_in(p_.batch.max_kv_length);
    const std::int64_t own = place.position / config.block_size;
    double* row = static_cast<double*>(p_.scores) +
                  (std::int64_t{group} * p_.batch.num_tokens + token) * blocks;
    std::fill(row, row + own + 1, kInfinity);
    std::fill(row + own + 1, row + blocks, -kInfinity);
    if (config.selects_all_at(place.position)) return;

    sum_heads(place, token, group, scratch);
    const std::int64_t visible = config.fine_windows(place.position + 1);
    for (std::int64_t b = config.init_blocks; b < config.first_local_block(place.position); ++b) {
      const std::int64_t first = config.first_window_of(b);
      const std::int64_t last = std::min(first + config.windows_per_block(), visible);
      double best = -kInfinity;
      for (std::int64_t j = std::max<std::int64_t>(0, first); j < last; ++j) {
        best = std::max(best, static_cast<double>(scratch.sums[j]));
      }
      row[b] = config.score_rounding == ScoreRounding::kBF16 ? round_to_bf16(best) : best;
    }
  }

 private:
  const ScoreParams& p_;
  Pages pages_;
  DType operand_;
};

}  // namespace

Status score(const Backend& backend, const ScoreParams& p, Workspace workspace) {
  const std::int64_t windows = p.config.fine_windows(p.batch.max_kv_length);
  const std::int64_t dim = p.pages.layout.head_dim;
  const std::int32_t groups = p.pages.layout.kv_heads;
  const std::int64_t workers = backend.pool->size();
  with_accumulator(rounding_of(backend), [&](auto zero) {
    using Real = decltype(zero);
    const Scorer<Real> scorer(backend, p);
    Arena arena(workspace);
    Real* logits = arena.take<Real>(windows * workers);
    Real* sums = arena.take<Real>(windows * workers);
    Real* q = arena.take<Real>(dim * workers);
    backend.pool->parallel_for(p.batch.num_tokens, [&](std::int64_t token, int worker) {
      const Place place = place_of(p.batch, token);
      if (!is_sparse(p.batch, place.sequence)) return;
      for (std::int32_t group = 0; group < groups; ++group) {
        scorer.score_blocks(place, token, group,
                            {.logits = logits + windows * worker,
                             .sums = sums + windows * worker,
                             .q = q + dim * worker});
      }
    });
  });
  return {};
}

std::size_t score_workspace_bytes(const Backend& backend, const ScoreParams& p) {
  const std::int64_t windows = p.config.fine_windows(p.batch.max_kv_length);
  const std::int64_t workers = backend.pool->size();
  ArenaSize size;
  size.take<double>(windows * workers);
  size.take<double>(windows * workers);
  size.take<double>(p.pages.layout.head_dim * workers);
  return size.bytes();
}

}  // namespace infllm::reference
