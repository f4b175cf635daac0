// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "infllm/backend/reference/align_row.h"
#include "infllm/backend/reference/rows.h"
#include "infllm/core/arena.h"

namespace infllm::reference {
namespace {

// What one worker needs to look at a row.
template <typename Real>
struct Scratch {
  Real* q;       // [D], rounded
  Real* logits;  // [keys of the longest sequence]
  Real* terms;   // [G, windows of the longest sequence] x
};

template <typename Real>
class Aligner {
 public:
  Aligner(const Backend& backend, const AlignParams& p)
      : p_(p),
        pages_(p.pages, p.batch),
        operand_(rounding_of(backend).operand),
        heads_(p.heads_q / p.pages.layout.kv_heads),
        dim_(p.pages.layout.head_dim),
        blocks_(p.config.blocks_in(p.batch.max_kv_length)) {}

  void run(std::int64_t r, std::int32_t group, const Scratch<Real>& w) const {
    const std::int64_t at = std::int64_t{group} * p_.num_rows + r;
    double* scores = static_cast<double*>(p_.grad_scores) + at * blocks_;
    std::int32_t* windows = p_.windows + at * blocks_;
    std::fill_n(scores, blocks_, 0.0);
    std::fill_n(windows, blocks_, -1);
    static_cast<double*>(p_.loss)[at] = 0;
    for (std::int32_t h = 0; h < heads_; ++h) norm_of(group, h, r) = 0;
    const AlignRow row(p_, r);
    if (row.first_block == row.end_block) return;

    for (std::int32_t h = 0; h < heads_; ++h) {
      add_target(row, group, h, w, scores);
      predict(row, group, h, r, w);
    }
    Real* s = w.logits;
    for (std::int64_t j = 0; j < row.visible; ++j) {
      s[j] =
          log_sum_exp<Real>(heads_, [&](std::int32_t h) { return w.terms[h * row.visible + j]; });
    }
    const SparseConfig& c = p_.config;
    for (std::int64_t b = row.first_block; b < row.end_block; ++b) {
      const std::int64_t first = std::max<std::int64_t>(0, c.first_window_of(b));
      const std::int64_t end = std::min(c.first_window_of(b) + c.windows_per_block(), row.visible);
      windows[b] = static_cast<std::int32_t>(std::max_element(s + first, s + end) - s);
    }
    const auto best = [&](std::int64_t b) { return s[windows[b]]; };
    const Real norm = log_sum_exp<Real>(row.end_block - row.first_block,
                                        [&](std::int64_t i) { return best(row.first_block + i); });
    Real mass = 0;
    Real loss = 0;
    for (std::int64_t b = row.first_block; b < row.end_block; ++b) {
      mass += static_cast<Real>(scores[b]);
      loss -= static_cast<Real>(scores[b]) * (best(b) - norm);
    }
    for (std::int64_t b = row.first_block; b < row.end_block; ++b) {
      scores[b] = std::exp(best(b) - norm) * mass - static_cast<Real>(scores[b]);
    }
    static_cast<double*>(p_.loss)[at] = static_cast<double>(loss);
  }

 private:
  double& norm_of(std::int32_t group, std::int32_t h, std::int64_t r) const {
    const std::int64_t head = std::int64_t{group} * heads_ + h;
    return static_cast<double*>(p_.norms)[head * p_.num_rows + r];
  }

  // Adds the head's share of A to the blocks of F.
  void add_target(const AlignRow& row, std::int32_t group, std::int32_t h, const Scratch<Real>& w,
                  double* target) const {
    load(p_.q, row, group, h, w);
    const std::int64_t count = row.place.position + 1;
    for (std::int64_t t = 0; t < count; ++t) {
      w.logits[t] = logit(w.q, pages_.key(row.place.sequence, group, t));
    }
    const Softmax<Real> all = exponentiate(w.logits, count);
    const std::int64_t tokens = p_.config.block_size;
    for (std::int64_t b = row.first_block; b < row.end_block; ++b) {
      Real sum = 0;
      for (std::int64_t t = b * tokens; t < (b + 1) * tokens; ++t) sum += w.logits[t];
      target[b] = static_cast<Real>(target[b]) + sum / all.sum / static_cast<Real>(heads_);
    }
  }

  // Writes the head's x and N.
  void predict(const AlignRow& row, std::int32_t group, std::int32_t h, std::int64_t r,
               const Scratch<Real>& w) const {
    load(p_.config.use_nope ? p_.q_score : p_.q, row, group, h, w);
    const Normaliser normaliser(p_, pages_, row, group);
    const Real norm =
        normaliser.count == 0 ? Real{0} : log_sum_exp<Real>(normaliser.count, [&](std::int64_t m) {
          return logit(w.q, normaliser.key(m));
        });
    norm_of(group, h, r) = static_cast<double>(norm);
    for (std::int64_t j = 0; j < row.visible; ++j) {
      w.terms[h * row.visible + j] = logit(w.q, pages_.fine(row.place.sequence, group, j)) - norm;
    }
  }

  void load(const void* q, const AlignRow& row, std::int32_t group, std::int32_t h,
            const Scratch<Real>& w) const {
    const std::int64_t head = std::int64_t{group} * heads_ + h;
    round_row(static_cast<const double*>(q) + (row.token * p_.heads_q + head) * dim_, dim_,
              operand_, w.q);
  }
  Real logit(const Real* q, const double* key) const {
    return static_cast<Real>(p_.scale) * dot<Real>(q, key, dim_);
  }

  const AlignParams& p_;
  Pages pages_;
  DType operand_;
  std::int32_t heads_;
  std::int64_t dim_;
  std::int64_t blocks_;
};

}  // namespace

Status align(const Backend& backend, const AlignParams& p, Workspace workspace) {
  const std::int64_t workers = backend.pool->size();
  const std::int64_t dim = p.pages.layout.head_dim;
  const std::int64_t keys = p.batch.max_kv_length;
  const std::int64_t terms = p.config.fine_windows(keys) * (p.heads_q / p.pages.layout.kv_heads);
  with_accumulator(rounding_of(backend), [&](auto zero) {
    using Real = decltype(zero);
    const Aligner<Real> aligner(backend, p);
    Arena arena(workspace);
    Real* q = arena.take<Real>(dim * workers);
    Real* logits = arena.take<Real>(keys * workers);
    Real* x = arena.take<Real>(terms * workers);
    backend.pool->parallel_for(p.num_rows, [&](std::int64_t r, int worker) {
      for (std::int32_t group = 0; group < p.pages.layout.kv_heads; ++group) {
        aligner.run(
            r, group,
            {.q = q + dim * worker, .logits = logits + keys * worker, .terms = x + terms * worker});
      }
    });
  });
  return {};
}

std::size_t align_workspace_bytes(const Backend& backend, const AlignParams& p) {
  const std::int64_t workers = backend.pool->size();
  const std::int64_t keys = p.batch.max_kv_length;
  ArenaSize size;
  size.take<double>(p.pages.layout.head_dim * workers);
  size.take<double>(keys * workers);
  size.take<double>(p.config.fine_windows(keys) * (p.heads_q / p.pages.layout.kv_heads) * workers);
  return size.bytes();
}

}  // namespace infllm::reference
