// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/reference/align_row.h"
#include "infllm/backend/reference/rows.h"
#include "infllm/core/arena.h"

namespace infllm::reference {
namespace {

// What one worker needs for a sequence and a KV head.
template <typename Real>
struct Scratch {
  Real* q;            // [G, D], rounded
  Real* terms;        // [G, windows] x
  Real* grad;         // [windows] ds
  Real* grad_q;       // [D]
  Real* grad_fine;    // [windows, D] dKC1
  Real* grad_coarse;  // [coarse windows, D] dKC2
  Real* sum;          // [D] of windows that hold a token

  template <typename Taker>
  void take(Taker&& taker, const AlignParams& p) {
    const std::int64_t heads = p.heads_q / p.pages.layout.kv_heads;
    const std::int64_t dim = p.pages.layout.head_dim;
    const std::int64_t fine = p.config.fine_windows(p.batch.max_kv_length);
    taker(q, heads * dim);
    taker(terms, heads * fine);
    taker(grad, fine);
    taker(grad_q, dim);
    taker(grad_fine, fine * dim);
    taker(grad_coarse, p.config.coarse_windows(p.batch.max_kv_length) * dim);
    taker(sum, dim);
  }
};

// Gradients of the rows of one sequence and of its keys, for one KV head.
template <typename Real>
class Backward {
 public:
  Backward(const Backend& backend, const AlignBackwardParams& p)
      : p_(p),
        f_(p.forward),
        pages_(f_.pages, f_.batch),
        rounding_(rounding_of(backend)),
        groups_(f_.pages.layout.kv_heads),
        heads_(f_.heads_q / groups_),
        dim_(f_.pages.layout.head_dim),
        blocks_(f_.config.blocks_in(f_.batch.max_kv_length)) {}

  void run(std::int32_t sequence, std::int64_t first_key, std::int32_t group,
           const Scratch<Real>& w) const {
    const SparseConfig& c = f_.config;
    const std::int64_t length = f_.batch.kv_length[sequence];
    std::fill_n(w.grad_fine, c.fine_windows(length) * dim_, Real{0});
    std::fill_n(w.grad_coarse, c.coarse_windows(length) * dim_, Real{0});
    for (std::int64_t r = 0; r < f_.num_rows; ++r) {
      const AlignRow row(f_, r);
      if (row.place.sequence == sequence) add_row(row, r, group, w);
    }
    for (std::int64_t t = 0; t < length; ++t) {
      std::fill_n(w.sum, dim_, Real{0});
      add_windows(t, c.kernel_size, c.kernel_stride, c.fine_windows(length), w.grad_fine, w.sum);
      add_windows(t, c.coarse_size(), c.coarse_stride(), c.coarse_windows(length), w.grad_coarse,
                  w.sum);
      write(w.sum, static_cast<double*>(p_.grad_k) + ((first_key + t) * groups_ + group) * dim_);
    }
  }

 private:
  void add_row(const AlignRow& row, std::int64_t r, std::int32_t group,
               const Scratch<Real>& w) const {
    const std::int64_t at = std::int64_t{group} * f_.num_rows + r;
    const double grad_loss = static_cast<const double*>(p_.grad_loss)[at];
    const double* scores = static_cast<const double*>(f_.grad_scores) + at * blocks_;
    const std::int32_t* windows = f_.windows + at * blocks_;
    std::fill_n(w.grad, row.visible, Real{0});
    for (std::int64_t b = row.first_block; b < row.end_block; ++b) {
      w.grad[windows[b]] += static_cast<Real>(grad_loss) * static_cast<Real>(scores[b]);
    }
    const void* q = f_.config.use_nope ? f_.q_score : f_.q;
    for (std::int32_t h = 0; h < heads_; ++h) {
      const std::int64_t head = std::int64_t{group} * heads_ + h;
      round_row(static_cast<const double*>(q) + (row.token * f_.heads_q + head) * dim_, dim_,
                rounding_.operand, w.q + h * dim_);
      const Real norm = norm_of(head, r);
      for (std::int64_t j = 0; j < row.visible; ++j) {
        w.terms[h * row.visible + j] =
            logit(w.q + h * dim_, pages_.fine(row.place.sequence, group, j)) - norm;
      }
    }
    const Normaliser normaliser(f_, pages_, row, group);
    Real* grad_norm_keys = normaliser.coarse ? w.grad_coarse : w.grad_fine;
    for (std::int32_t h = 0; h < heads_; ++h) {
      const std::int64_t head = std::int64_t{group} * heads_ + h;
      const Real* query = w.q + h * dim_;
      std::fill_n(w.grad_q, dim_, Real{0});
      Real total = 0;  // X
      for (std::int64_t j = 0; j < row.visible; ++j) {
        if (w.grad[j] == 0) continue;
        const Real s =
            log_sum_exp<Real>(heads_, [&](std::int32_t i) { return w.terms[i * row.visible + j]; });
        const Real grad = std::exp(w.terms[h * row.visible + j] - s) * w.grad[j];
        total += grad;
        const Real factor = static_cast<Real>(f_.scale) * operand(grad);
        add(w.grad_q, factor, pages_.fine(row.place.sequence, group, j));
        add(w.grad_fine + j * dim_, factor, query);
      }
      for (std::int64_t m = 0; m < normaliser.count; ++m) {
        const Real share = std::exp(logit(query, normaliser.key(m)) - norm_of(head, r));
        const Real factor = -static_cast<Real>(f_.scale) * operand(total * share);
        add(w.grad_q, factor, normaliser.key(m));
        add(grad_norm_keys + m * dim_, factor, query);
      }
      write(w.grad_q, static_cast<double*>(p_.grad_q) + (r * f_.heads_q + head) * dim_);
    }
  }

  // Adds what token t gets from the windows that hold it.
  void add_windows(std::int64_t t, std::int64_t size, std::int64_t stride, std::int64_t windows,
                   const Real* grad, Real* sum) const {
    const std::int64_t first = t < size ? 0 : (t - size) / stride + 1;
    for (std::int64_t j = first; j < windows && j * stride <= t; ++j) {
      add(sum, Real{1} / static_cast<Real>(size), grad + j * dim_);
    }
  }

  Real norm_of(std::int64_t head, std::int64_t r) const {
    return static_cast<Real>(static_cast<const double*>(f_.norms)[head * f_.num_rows + r]);
  }
  Real logit(const Real* q, const double* key) const {
    return static_cast<Real>(f_.scale) * dot<Real>(q, key, dim_);
  }
  Real operand(Real value) const {
    return static_cast<Real>(round_to(rounding_.operand, static_cast<double>(value)));
  }
  template <typename Number>
  void add(Real* sum, Real factor, const Number* row) const {
    for (std::int64_t d = 0; d < dim_; ++d) sum[d] += factor * static_cast<Real>(row[d]);
  }
  void write(const Real* row, double* to) const {
    for (std::int64_t d = 0; d < dim_; ++d) {
      to[d] = round_to(rounding_.output, static_cast<double>(row[d]));
    }
  }

  const AlignBackwardParams& p_;
  const AlignParams& f_;
  Pages pages_;
  Rounding rounding_;
  std::int32_t groups_, heads_;
  std::int64_t dim_;
  std::int64_t blocks_;
};

}  // namespace

// One task owns all keys that it writes, so sums are taken in one order whatever the thread count.
Status align_backward(const Backend& backend, const AlignBackwardParams& p, Workspace workspace) {
  const AlignParams& f = p.forward;
  const std::int64_t groups = f.pages.layout.kv_heads;
  std::fill_n(static_cast<double*>(p.grad_q),
              std::int64_t{f.num_rows} * f.heads_q * f.pages.layout.head_dim, 0.0);
  with_accumulator(rounding_of(backend), [&](auto zero) {
    using Real = decltype(zero);
    const Backward<Real> backward(backend, p);
    Arena arena(workspace);
    auto* first_key = arena.take<std::int64_t>(f.batch.num_sequences);
    auto* scratch = arena.take<Scratch<Real>>(backend.pool->size());
    for (int worker = 0; worker < backend.pool->size(); ++worker) {
      scratch[worker].take(
          [&](Real*& pointer, std::int64_t count) { pointer = arena.take<Real>(count); }, f);
    }
    std::int64_t keys = 0;
    for (std::int32_t s = 0; s < f.batch.num_sequences; ++s) {
      first_key[s] = keys;
      keys += f.batch.kv_length[s];
    }
    backend.pool->parallel_for(f.batch.num_sequences * groups, [&](std::int64_t task, int worker) {
      const auto sequence = static_cast<std::int32_t>(task / groups);
      backward.run(sequence, first_key[sequence], static_cast<std::int32_t>(task % groups),
                   scratch[worker]);
    });
  });
  return {};
}

std::size_t align_backward_workspace_bytes(const Backend& backend, const AlignBackwardParams& p) {
  ArenaSize size;
  size.take<std::int64_t>(p.forward.batch.num_sequences);
  size.take<Scratch<double>>(backend.pool->size());
  for (int worker = 0; worker < backend.pool->size(); ++worker) {
    Scratch<double>{}.take([&](double*&, std::int64_t count) { size.take<double>(count); },
                           p.forward);
  }
  return size.bytes();
}

}  // namespace infllm::reference
