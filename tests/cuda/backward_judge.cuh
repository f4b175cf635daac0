// SPDX-License-Identifier: Apache-2.0
//
// What attend_backward must yield, in double, for sampled rows (dQ) and keys (dK, dV) of a bed: a
// rig with a forward pass behind it and gradients to start from. The bounds are sums of roundings,
// as in prefill_check.h, from the O and LSE that the kernel was given.
#pragma once

#include "infllm/ops/attend.h"
#include "tests/cuda/prefill_check.h"

namespace infllm::cuda {

template <typename T>
std::vector<T> normals(std::size_t count, std::uint64_t seed) {
  constexpr std::size_t kPiece = 1 << 20;
  std::vector<T> values(count);
  parallel(int((count + kPiece - 1) / kPiece), [&](int piece) {
    Random random{seed + 0x9e3779b97f4a7c15ull * std::uint64_t(piece)};
    const std::size_t end = std::min(count, (piece + 1) * kPiece);
    for (std::size_t i = piece * kPiece; i < end; ++i) values[i] = T(random.normal());
  });
  return values;
}

// A rig, what the forward pass made of it, and where gradients go.
template <typename T>
struct Bed {
  Bed(const Case& c, const std::vector<int>& lists, int list_columns)
      : rig(c),
        selection(lists),
        columns(list_columns),
        given(lists),
        o(rig.queries.size()),
        lse(std::size_t(rig.heads_q()) * rig.batch.num_tokens),
        grad_o_host(normals<T>(rig.queries.size(), 0x51ed270b)),
        grad_lse_host(normals<float>(lse.size(), 0x2545f491)),
        grad_o(grad_o_host),
        grad_lse(grad_lse_host) {
    for (const Span& s : c.spans) keys += s.end;
  }

  AttendBackwardParams params(T* grad_q, T* grad_k, T* grad_v) const {
    AttendParams forward =
        rig.attend_params(o.data(), lse.data(), columns > 0 ? given.data() : nullptr);
    forward.columns = columns;
    return {.forward = forward,
            .grad_o = grad_o.data(),
            .grad_lse = grad_lse.data(),
            .grad_q = grad_q,
            .grad_k = grad_k,
            .grad_v = grad_v};
  }
  std::size_t key_count() const { return keys * rig.c.heads_kv * rig.c.dim; }

  Rig<T> rig;
  std::vector<int> selection;  // [Hkv, T, columns]; empty: dense
  int columns;
  Array<int> given;
  Array<T> o;
  Array<float> lse;
  std::vector<T> grad_o_host;
  std::vector<float> grad_lse_host;
  Array<T> grad_o;
  Array<float> grad_lse;
  std::size_t keys = 0;
};

template <typename T>
struct Gradients {
  std::vector<T> q, k, v;
};

// A vector of T in double, and its length.
struct Wide {
  explicit Wide(int dim) : x(dim) {}
  template <typename T>
  void take(const T* from) {
    for (std::size_t d = 0; d < x.size(); ++d) x[d] = float(from[d]);
    norm = std::sqrt(dot(x.data(), x.data(), int(x.size())));
  }
  std::vector<double> x;
  double norm = 0;
};

// A key with its value, and one head of a token's query with what came back for it.
struct WideKey {
  explicit WideKey(int dim) : k(dim), v(dim) {}
  Wide k, v;
};
struct WideRow {
  explicit WideRow(int dim) : q(dim), grad_o(dim) {}
  Wide q, grad_o;
  double lse = 0, grad_lse = 0, delta = 0, o_norm = 0;
};

// A sum over pairs, for every number of a vector: its terms, their sizes, their errors.
struct Sums {
  explicit Sums(int dim) : sum(dim), size(dim), error(dim) {}
  void add(double factor, double factor_error, const std::vector<double>& x) {
    factor_error = std::fabs(factor_error);
    for (std::size_t d = 0; d < x.size(); ++d) {
      sum[d] += factor * x[d];
      size[d] += std::fabs(factor * x[d]);
      error[d] += factor_error * std::fabs(x[d]);
    }
  }
  std::vector<double> sum, size, error;
};

// One (row, key) pair in double, and what a kernel may be off by.
template <typename T>
class Judge {
 public:
  Judge(const Bed<T>& bed)
      : bed_(bed), rig_(bed.rig), o_(bed.o.host()), lse_(bed.lse.host()), dim_(rig_.c.dim) {}

  bool sees(const Place& at, int g, int block) const {
    if (block > at.position / 64) return false;
    if (bed_.columns == 0 || !rig_.c.spans[at.sequence].sparse) return true;
    const int* row =
        bed_.selection.data() + (std::int64_t{g} * rig_.batch.num_tokens + at.token) * bed_.columns;
    return std::find(row, row + bed_.columns, block) != row + bed_.columns;
  }

  // False where the page is missing.
  bool read(WideKey& key, int sequence, int position, int g) const {
    const T* k = rig_.row(sequence, position / 64, rig_.map.key(g), position % 64);
    if (k == nullptr) return false;
    key.k.take(k);
    key.v.take(rig_.row(sequence, position / 64, rig_.map.value(g), position % 64));
    return true;
  }
  void read(WideRow& row, int token, int h) const {
    const std::int64_t at = (std::int64_t{token} * rig_.heads_q() + h) * dim_;
    const std::int64_t stat = std::int64_t{h} * rig_.batch.num_tokens + token;
    row.q.take(rig_.queries.data() + at);
    row.grad_o.take(bed_.grad_o_host.data() + at);
    row.lse = lse_[stat];
    row.grad_lse = bed_.grad_lse_host[stat];
    row.delta = dot(row.grad_o.x.data(), o_.data() + at, dim_) - row.grad_lse;
    row.o_norm = norm(o_.data() + at, dim_);
  }

  struct Pair {
    double p, grad_x;              // the weight and dS
    double p_error, grad_x_error;  // before they are rounded to T, and the rounding
  };
  Pair pair(const WideRow& row, const WideKey& key) const {
    const double x = rig_.scale() * dot(row.q.x.data(), key.k.x.data(), dim_);
    const double p = std::exp(x - row.lse);
    const double grad_p = dot(row.grad_o.x.data(), key.v.x.data(), dim_);
    const double additions = (dim_ + 4) * 0x1p-24;
    // Of x - LSE: the product's additions, log2(e) within both numbers; then the exponential.
    const double share = additions * rig_.scale() * row.q.norm * key.k.norm +
                         (std::fabs(x) + std::fabs(row.lse)) * 0x1p-22 + 0x1p-20;
    const double sums =
        additions * row.grad_o.norm * (key.v.norm + row.o_norm) + std::fabs(row.grad_lse) * 0x1p-23;
    const double grad_x = p * (grad_p - row.delta);
    return {p, grad_x, p * (share + kUnit<T>)+kTiny,
            std::fabs(grad_x) * (share + kUnit<T>)+p * (1 + share) * sums + kTiny};
  }

  // The sum of `count` pairs' dS (or P) times the numbers of a vector, and the result's rounding.
  void compare(Report& report, const T* got, const Sums& want, std::size_t count,
               double factor) const {
    const double chain = double(count) * 0x1p-24;
    for (int d = 0; d < dim_; ++d) {
      report.compare(float(got[d]), want.sum[d] * factor,
                     factor * (want.error[d] + 2 * chain * want.size[d]) +
                         std::fabs(want.sum[d] * factor) * 2 * kUnit<T> + kTiny);
    }
  }

 private:
  // Half the smallest number of T, for results that flush.
  static constexpr double kTiny = std::is_same_v<T, __half> ? 0x1p-24 : 1e-30;

  const Bed<T>& bed_;
  const Rig<T>& rig_;
  std::vector<T> o_;
  std::vector<float> lse_;
  int dim_;
};

template <typename T>
Report check_queries(const Bed<T>& bed, const Judge<T>& judge, const std::vector<T>& grad_q) {
  const Rig<T>& rig = bed.rig;
  const int dim = rig.c.dim;
  const std::vector<Place> places = sample(rig, 24);
  std::vector<Report> reports(places.size() * rig.c.heads_kv);
  parallel(int(reports.size()), [&](int task) {  // all query heads of a KV head: they share keys
    const Place at = places[task / rig.c.heads_kv];
    const int g = task % rig.c.heads_kv;
    std::vector<WideRow> rows(rig.c.group, WideRow(dim));
    std::vector<Sums> sums(rig.c.group, Sums(dim));
    for (int i = 0; i < rig.c.group; ++i) judge.read(rows[i], at.token, g * rig.c.group + i);
    WideKey key(dim);
    std::size_t count = 0;
    for (int t = 0; t <= at.position; ++t) {
      if (!judge.sees(at, g, t / 64) || !judge.read(key, at.sequence, t, g)) continue;
      ++count;
      for (int i = 0; i < rig.c.group; ++i) {
        const auto pair = judge.pair(rows[i], key);
        sums[i].add(pair.grad_x, pair.grad_x_error, key.k.x);
      }
    }
    for (int i = 0; i < rig.c.group; ++i) {
      const std::int64_t row = std::int64_t{at.token} * rig.heads_q() + g * rig.c.group + i;
      judge.compare(reports[task], grad_q.data() + row * dim, sums[i], count, rig.scale());
    }
  });
  return sum_of(reports);
}

// Some keys of every sequence: the first ones, the last ones and random ones.
template <typename T>
Report check_keys(const Bed<T>& bed, const Judge<T>& judge, const Gradients<T>& gradients) {
  const Rig<T>& rig = bed.rig;
  const int dim = rig.c.dim;
  struct Key {
    int sequence, position;
    std::int64_t packed;
    int first_token;
  };
  std::vector<Key> keys;
  Random random{99};
  std::int64_t before = 0;
  int token = 0;
  for (int s = 0; s < int(rig.c.spans.size()); ++s) {
    const Span& span = rig.c.spans[s];
    const int samples = rig.c.spans.size() > 10 ? 3 : 10;
    for (int i = 0; i < samples && span.end > 0; ++i) {
      const int t = i == 0   ? 0
                    : i == 1 ? span.end - 1
                    : i == 2 ? std::max(0, span.first - 1)
                             : random.below(span.end);
      keys.push_back({s, t, before + t, token});
    }
    before += span.end;
    token += span.end - span.first;
  }
  std::vector<Report> reports(keys.size() * rig.c.heads_kv);
  parallel(int(reports.size()), [&](int task) {
    const Key key = keys[task / rig.c.heads_kv];
    const int g = task % rig.c.heads_kv;
    const Span& span = rig.c.spans[key.sequence];
    WideKey wide(dim);
    WideRow row(dim);
    Sums k_sums(dim), v_sums(dim);
    std::size_t count = 0;
    const bool cached = judge.read(wide, key.sequence, key.position, g);
    for (int p = std::max(span.first, key.position); cached && p < span.end; ++p) {
      const Place at{key.sequence, p, key.first_token + p - span.first};
      if (!judge.sees(at, g, key.position / 64)) continue;
      for (int h = g * rig.c.group; h < (g + 1) * rig.c.group; ++h, ++count) {
        judge.read(row, at.token, h);
        const auto pair = judge.pair(row, wide);
        k_sums.add(pair.grad_x, pair.grad_x_error, row.q.x);
        v_sums.add(pair.p, pair.p_error, row.grad_o.x);
      }
    }
    const std::int64_t at = (key.packed * rig.c.heads_kv + g) * dim;
    judge.compare(reports[task], gradients.k.data() + at, k_sums, count, rig.scale());
    judge.compare(reports[task], gradients.v.data() + at, v_sums, count, 1);
  });
  return sum_of(reports);
}

}  // namespace infllm::cuda
