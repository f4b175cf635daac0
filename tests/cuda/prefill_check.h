// SPDX-License-Identifier: Apache-2.0
//
// What prefill must yield, in double, for sampled tokens of a rig: scores on the cached pooled
// keys, selections of the kernel's own scores, attention on the selection that the kernel was
// given. The bounds are sums of roundings: the 16-bit type's for each weight P and each result,
// 2^-24 for each addition of a product.
#pragma once

#include <cfloat>
#include <functional>
#include <thread>

#include "tests/cuda/prefill_rig.cuh"

namespace infllm::cuda {

// What went wrong in a case; worst is the largest error as a share of its bound.
struct Report {
  double worst = 0;
  int wrong = 0;
  void compare(double got, double want, double bound) {
    if (std::fabs(want) > FLT_MAX) want = std::copysign(INFINITY, want);  // for everybody
    if (std::isinf(want) && got == want) return;
    const double share = std::fabs(got - want) / bound;
    worst = std::isnan(share) ? INFINITY : std::max(worst, share);
    wrong += !(share <= 1);
  }
};

inline Report sum_of(const std::vector<Report>& reports) {
  Report total;
  for (const Report& r : reports) {
    total.worst = std::max(total.worst, r.worst);
    total.wrong += r.wrong;
  }
  return total;
}

inline double wide(double x) { return x; }
template <typename T>
double wide(T x) {
  return double(float(x));
}

// Of n numbers, a multiple of 8: sums that do not wait for each other.
double dot(const auto* a, const auto* b, int n) {
  double sums[8] = {};
  for (int i = 0; i < n; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += wide(a[i + j]) * wide(b[i + j]);
  }
  return std::accumulate(sums, sums + 8, 0.0);
}

template <typename T>
double norm(const T* a, int n) {
  return std::sqrt(dot(a, a, n));
}

template <typename T>
constexpr double kUnit = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;

// A token to look at: sequence, position, place on the packed axis.
struct Place {
  int sequence, position, token;
};

template <typename T>
std::vector<Place> sample(const Rig<T>& rig, int most) {
  std::vector<Place> places;
  int token = 0;
  for (int s = 0; s < int(rig.c.spans.size()); ++s) {
    const Span& span = rig.c.spans[s];
    for (int p = span.first; p < span.end; ++p) places.push_back({s, p, token++});
  }
  Random random{77};
  const int step = std::max<int>(1, int(places.size()) / most);
  std::vector<Place> chosen;
  for (std::size_t i = 0; i < places.size(); ++i) {
    const Span& span = rig.c.spans[places[i].sequence];
    const bool edge = places[i].position == span.first || places[i].position == span.end - 1;
    if (edge || random.below(step) == 0) chosen.push_back(places[i]);
  }
  return chosen;
}

inline void parallel(int tasks, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  const int count = std::max(1u, std::thread::hardware_concurrency());
  for (int w = 0; w < count; ++w) {
    threads.emplace_back([&, w] {
      for (int i = w; i < tasks; i += count) body(i);
    });
  }
  for (std::thread& t : threads) t.join();
}

template <typename T>
Report check_scores(const Rig<T>& rig, const std::vector<float>& scores) {
  const SparseConfig& config = rig.c.config;
  const std::int64_t blocks = config.blocks_in(rig.batch.max_kv_length);
  const int dim = rig.c.dim;
  const std::vector<Place> places = sample(rig, 60);
  std::vector<Report> reports(places.size() * rig.c.heads_kv);
  parallel(int(reports.size()), [&](int task) {
    const Place at = places[task / rig.c.heads_kv];
    const int g = task % rig.c.heads_kv;
    if (!rig.c.spans[at.sequence].sparse) return;
    Report& report = reports[task];
    const float* row = scores.data() + (std::int64_t{g} * rig.batch.num_tokens + at.token) * blocks;
    const int own = at.position / 64;
    const bool all = config.selects_all_at(at.position);
    const std::int64_t local = all ? 0 : config.first_local_block(at.position);
    const bool from_coarse = config.lse_source == LseSource::kCoarse;
    const int visible = fine_windows(at.position + 1);
    const int norms = from_coarse ? coarse_windows(at.position + 1) : visible;
    std::vector<double> sums(std::max(visible, 1), 0), errors(sums.size(), 0);
    for (int h = 0; !all && norms > 0 && h < rig.c.group; ++h) {
      const T* q =
          rig.queries.data() + (std::int64_t{at.token} * rig.heads_q() + g * rig.c.group + h) * dim;
      const auto fine = [&](int j) { return rig.row(at.sequence, j / 4, rig.map.fine(g), j % 4); };
      const auto key = [&](int m) {
        return from_coarse ? rig.row(at.sequence, m, rig.map.coarse(g), 0) : fine(m);
      };
      std::vector<double> x(norms);
      double longest = 0;
      for (int m = 0; m < norms; ++m) {
        x[m] = rig.scale() * dot(q, key(m), dim);
        longest = std::max(longest, norm(key(m), dim));
      }
      const double top = *std::max_element(x.begin(), x.end());
      double z = 0;
      for (const double v : x) z += std::exp(v - top);
      const double additions = (dim + 4) * 0x1p-24 * rig.scale() * norm(q, dim);
      for (int j = 0; j < visible; ++j) {
        const double logit = rig.scale() * dot(q, fine(j), dim);
        const double p = std::exp(logit - top) / z;
        // Errors of both logits, of the sum over windows, of two exponentials and of c x - lse.
        const double error = additions * (norm(fine(j), dim) + longest) + norms / 8 * 0x1p-24 +
                             0x1p-20 + (std::fabs(logit) + std::fabs(top)) * 0x1p-22;
        sums[j] += p;
        errors[j] += p * error;
      }
    }
    for (std::int64_t b = 0; b < blocks; ++b) {
      if (b > own || b >= local || b < config.init_blocks) {
        report.compare(row[b], b > own ? -INFINITY : INFINITY, 0);
        continue;
      }
      double best = 0, error = 0;
      for (std::int64_t j = std::max<std::int64_t>(0, 4 * b - 1);
           j < std::min<std::int64_t>(4 * b + 4, visible); ++j) {
        best = std::max(best, sums[j]);
        error = std::max(error, errors[j]);
      }
      const bool round = config.score_rounding == ScoreRounding::kBF16;
      report.compare(row[b], best, error + best * (round ? 0x1.02p-8 : 0x1p-22) + 1e-37);
    }
  });
  return sum_of(reports);
}

// Sorting by definition, on the kernel's own scores.
template <typename T>
int check_selection(const Rig<T>& rig, const std::vector<float>& scores,
                    const std::vector<int>& selection) {
  const SparseConfig& config = rig.c.config;
  const int columns = rig.select_params(nullptr, nullptr).columns();
  const std::int64_t blocks = config.blocks_in(rig.batch.max_kv_length);
  const std::vector<Place> places = sample(rig, 4000);
  std::vector<int> wrong(places.size() * rig.c.heads_kv);
  parallel(int(wrong.size()), [&](int task) {
    const Place at = places[task / rig.c.heads_kv];
    if (!rig.c.spans[at.sequence].sparse) return;
    const std::int64_t row = std::int64_t{task % rig.c.heads_kv} * rig.batch.num_tokens + at.token;
    const int own = at.position / 64;
    const int window = config.local_blocks();
    struct Key {
      int tier;
      double value;
      int block;
      auto operator<=>(const Key&) const = default;
    };
    std::vector<Key> order;
    for (int b = 0; b <= own; ++b) {
      if (own - b < window) {
        order.push_back({0, double(own - b), b});
      } else if (b < config.init_blocks) {
        order.push_back({1, double(b), b});
      } else {
        order.push_back({2, -double(scores[row * blocks + b]), b});
      }
    }
    std::sort(order.begin(), order.end(), std::less<>());
    order.resize(std::min<std::size_t>(order.size(), columns));
    std::vector<int> want;
    for (const Key& key : order) want.push_back(key.block);
    std::sort(want.begin(), want.end());
    want.resize(columns, -1);
    wrong[task] = !std::equal(want.begin(), want.end(), selection.begin() + row * columns);
  });
  return std::accumulate(wrong.begin(), wrong.end(), 0);
}

template <typename T>
Report check_attention(const Rig<T>& rig, const std::vector<T>& o, const std::vector<float>& lse,
                       const std::vector<int>& selection, int most) {
  const int dim = rig.c.dim;
  const int columns = selection.empty() ? 0 : rig.select_params(nullptr, nullptr).columns();
  const std::vector<Place> places = sample(rig, most);
  std::vector<Report> reports(places.size() * rig.heads_q());
  parallel(int(reports.size()), [&](int task) {
    const Place at = places[task / rig.heads_q()];
    const int h = task % rig.heads_q();
    const int g = h / rig.c.group;
    const T* q = rig.queries.data() + (std::int64_t{at.token} * rig.heads_q() + h) * dim;
    std::vector<int> blocks;
    if (columns > 0 && rig.c.spans[at.sequence].sparse) {
      const int* row =
          selection.data() + (std::int64_t{g} * rig.batch.num_tokens + at.token) * columns;
      for (int i = 0; i < columns; ++i) {
        if (row[i] >= 0 && row[i] <= at.position / 64) blocks.push_back(row[i]);
      }
    } else {
      blocks.resize(at.position / 64 + 1);
      std::iota(blocks.begin(), blocks.end(), 0);
    }
    std::vector<double> x;
    std::vector<const T*> values;
    double longest = 0;
    for (const int b : blocks) {
      for (int t = b * 64; t < std::min(b * 64 + 64, at.position + 1); ++t) {
        const T* k = rig.row(at.sequence, b, rig.map.key(g), t % 64);
        if (k == nullptr) break;
        x.push_back(rig.scale() * dot(q, k, dim));
        longest = std::max(longest, norm(k, dim));
        values.push_back(rig.row(at.sequence, b, rig.map.value(g), t % 64));
      }
    }
    Report& report = reports[task];
    const T* got = o.data() + (std::int64_t{at.token} * rig.heads_q() + h) * dim;
    const double got_lse = lse[std::int64_t{h} * rig.batch.num_tokens + at.token];
    if (x.empty()) {
      for (int d = 0; d < dim; ++d) report.compare(float(got[d]), 0, 1e-30);
      report.compare(got_lse, -INFINITY, 0);
      return;
    }
    const double top = *std::max_element(x.begin(), x.end());
    double z = 0;
    for (double& v : x) z += v = std::exp(v - top);
    // Of a logit: the product's additions and the multiplications by c.
    const double logit = (dim + 4) * 0x1p-24 * rig.scale() * norm(q, dim) * longest + 0x1p-21;
    const double chain = double(x.size()) * 0x1p-24;  // additions of weights and of P V
    report.compare(got_lse, top + std::log(z), logit + chain + std::fabs(top) * 0x1p-22 + 1e-6);
    for (int d = 0; d < dim; ++d) {
      double sum = 0, size = 0;
      for (std::size_t i = 0; i < x.size(); ++i) {
        const double v = float(values[i][d]);
        sum += x[i] * v;
        size += x[i] * std::fabs(v);
      }
      const double bound = size / z * (kUnit<T> + 2 * logit + 2 * chain + 0x1p-20) +
                           std::fabs(sum / z) * 2 * kUnit<T> +
                           (std::is_same_v<T, __half> ? 0x1p-24 : 1e-30);
      report.compare(float(got[d]), sum / z, bound);
    }
  });
  return sum_of(reports);
}

}  // namespace infllm::cuda
