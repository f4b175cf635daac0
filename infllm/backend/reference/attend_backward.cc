// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/reference/math.h"
#include "infllm/backend/reference/rows.h"
#include "infllm/backend/reference/visible.h"
#include "infllm/core/arena.h"

namespace infllm::reference {
namespace {

template <typename T>
T* at(const void* base, std::int64_t index) {
  return static_cast<T*>(const_cast<void*>(base)) + index;
}

// Gradients of the tokens of one sequence and of its keys and values, for one KV head.
template <typename Real>
class Backward {
 public:
  Backward(const Backend& backend, const AttendBackwardParams& p)
      : p_(p),
        f_(p.forward),
        pages_(f_.pages, f_.batch),
        rounding_(rounding_of(backend)),
        groups_(f_.pages.layout.kv_heads),
        heads_(f_.heads_q / groups_),
        dim_(f_.pages.layout.head_dim) {}

  void run(std::int32_t sequence, std::int64_t first_key, std::int32_t group,
           std::int32_t* positions, Real* rows) const {
    const std::int64_t length = f_.batch.kv_length[sequence];
    const auto key_row = [&](std::int64_t t) { return ((first_key + t) * groups_ + group) * dim_; };
    for (std::int64_t t = 0; t < length; ++t) {
      std::fill_n(at<double>(p_.grad_k, key_row(t)), dim_, 0.0);
      std::fill_n(at<double>(p_.grad_v, key_row(t)), dim_, 0.0);
    }
    for (std::int64_t token = f_.batch.query_start[sequence];
         token < f_.batch.query_start[sequence + 1]; ++token) {
      const Place place = place_of(f_.batch, token);
      const std::int64_t count = visible_positions(f_, place, token, group, positions);
      for (std::int32_t h = group * heads_; h < (group + 1) * heads_; ++h) {
        const std::int64_t row = (token * f_.heads_q + h) * dim_;
        Real* q = rows;
        Real* grad_o = rows + dim_;
        round_row(at<const double>(f_.q, row), dim_, rounding_.operand, q);
        round_row(at<const double>(p_.grad_o, row), dim_, rounding_.operand, grad_o);
        const double* o = at<const double>(f_.o, row);
        double* grad_q = at<double>(p_.grad_q, row);
        const std::int64_t stat = std::int64_t{h} * f_.batch.num_tokens + token;
        const Real lse = static_cast<Real>(*at<const double>(f_.lse, stat));
        const Real delta = dot<Real>(grad_o, o, dim_);  // sum dO O
        const Real grad_lse =
            p_.grad_lse ? static_cast<Real>(*at<const double>(p_.grad_lse, stat)) : 0;
        std::fill_n(grad_q, dim_, 0.0);
        for (std::int64_t i = 0; i < count; ++i) {
          const std::int64_t t = positions[i];
          const double* key = pages_.key(sequence, group, t);
          const double* value = pages_.value(sequence, group, t);
          const Real x = static_cast<Real>(f_.scale) * dot<Real>(q, key, dim_);
          const Real weight = std::exp(x - lse);
          const Real grad_weight = dot<Real>(grad_o, value, dim_);
          const Real grad_x = weight * (grad_weight - delta + grad_lse);
          const Real factor = static_cast<Real>(f_.scale) * operand(grad_x);
          add(grad_q, factor, key);
          add(at<double>(p_.grad_k, key_row(t)), factor, q);
          add(at<double>(p_.grad_v, key_row(t)), operand(weight), grad_o);
        }
        round(grad_q);
      }
    }
    for (std::int64_t t = 0; t < length; ++t) {
      round(at<double>(p_.grad_k, key_row(t)));
      round(at<double>(p_.grad_v, key_row(t)));
    }
  }

 private:
  Real operand(Real value) const {
    return static_cast<Real>(round_to(rounding_.operand, static_cast<double>(value)));
  }
  // Sums live in the output arrays, but hold no more digits than Real.
  template <typename Number>
  void add(double* sum, Real factor, const Number* row) const {
    for (std::int64_t d = 0; d < dim_; ++d) {
      sum[d] = static_cast<Real>(sum[d]) + factor * static_cast<Real>(row[d]);
    }
  }
  void round(double* row) const { round_row(row, dim_, rounding_.output, row); }

  const AttendBackwardParams& p_;
  const AttendParams& f_;
  Pages pages_;
  Rounding rounding_;
  std::int32_t groups_, heads_;
  std::int64_t dim_;
};

}  // namespace

// One task owns all that it writes, so sums are taken in one order whatever the thread count.
Status attend_backward(const Backend& backend, const AttendBackwardParams& p, Workspace workspace) {
  const Batch& batch = p.forward.batch;
  const std::int32_t groups = p.forward.pages.layout.kv_heads;
  Arena arena(workspace);
  auto* positions = arena.take<std::int32_t>(batch.max_kv_length * backend.pool->size());
  auto* first_key = arena.take<std::int64_t>(batch.num_sequences);
  const std::int64_t dim = p.forward.pages.layout.head_dim;
  std::int64_t keys = 0;
  for (std::int32_t s = 0; s < batch.num_sequences; ++s) {
    first_key[s] = keys;
    keys += batch.kv_length[s];
  }
  with_accumulator(rounding_of(backend), [&](auto zero) {
    using Real = decltype(zero);
    const Backward<Real> backward(backend, p);
    auto* rows = arena.take<Real>(2 * dim * backend.pool->size());
    const std::int64_t tasks = std::int64_t{batch.num_sequences} * groups;
    backend.pool->parallel_for(tasks, [&](std::int64_t task, int worker) {
      const auto sequence = static_cast<std::int32_t>(task / groups);
      backward.run(sequence, first_key[sequence], static_cast<std::int32_t>(task % groups),
                   positions + std::int64_t{batch.max_kv_length} * worker, rows + 2 * dim * worker);
    });
  });
  return {};
}

std::size_t attend_backward_workspace_bytes(const Backend& backend, const AttendBackwardParams& p) {
  ArenaSize size;
  size.take<std::int32_t>(std::int64_t{p.forward.batch.max_kv_length} * backend.pool->size());
  size.take<std::int64_t>(p.forward.batch.num_sequences);
  size.take<double>(std::int64_t{2} * p.forward.pages.layout.head_dim * backend.pool->size());
  return size.bytes();
}

}  // namespace infllm::reference
