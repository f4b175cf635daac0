// SPDX-License-Identifier: Apache-2.0
//
// Judges what a kernel made of a case, by the budget of tests/support/budget.h: every number within
// twice the worst error of an honest kernel (products and exponentials in float, weights and
// results rounded to the stored type) plus one ulp, and so all numbers together by root mean
// square.
#pragma once

#include <array>
#include <limits>
#include <thread>

#include "tests/cuda/sm90_attend_bed.cuh"

namespace infllm::cuda::testing {

// What was got, what is exact, what an honest kernel makes.
struct Number {
  double got, exact, honest;
};

// The group's heads of one token and KV head.
template <typename T>
struct Sample {
  int sequence, token, head;         // token: of the sequence's step
  std::vector<std::int32_t> chosen;  // empty: dense
  std::vector<T> got;                // [G, D]
  std::vector<float> got_lse;        // [G]
};

struct Findings {
  std::vector<Number> o, lse;
};

template <typename T>
std::vector<int> visible(const Bed<T>& bed, const Sample<T>& sample) {
  const Case& c = bed.test;
  const SequenceCase& sequence = c.sequences[static_cast<std::size_t>(sample.sequence)];
  const int position = sequence.history + sample.token;
  std::vector<int> positions;
  const auto see = [&](int block) {
    if (block > position / kPageTokens) return;
    const int page =
        bed.table[static_cast<std::size_t>(sample.sequence * bed.params.batch.max_pages + block)];
    if (page < 0 || page >= bed.params.pages.num_pages) return;
    for (int p = block * kPageTokens; p < (block + 1) * kPageTokens && p <= position; ++p) {
      positions.push_back(p);
    }
  };
  if (sample.chosen.empty() || !sequence.sparse) {
    for (int block = 0; block <= position / kPageTokens; ++block) see(block);
  } else {
    for (const std::int32_t block : sample.chosen) {
      if (block >= 0) see(block);
    }
  }
  return positions;
}

template <typename T>
void examine(const Bed<T>& bed, const Sample<T>& sample, Findings& findings) {
  const Case& c = bed.test;
  const auto dim = static_cast<std::size_t>(c.dim);
  const std::vector<int> positions = visible(bed, sample);
  const std::size_t count = positions.size();
  std::vector<double> keys(count * dim), values(count * dim);
  for (std::size_t i = 0; i < count * dim; ++i) {
    const auto at =
        static_cast<std::uint64_t>(place(sample.sequence, c.heads_kv, sample.head,
                                         positions[i / dim], c.dim, static_cast<int>(i % dim)));
    keys[i] = as_double(stored<T>(number(kKey, at)));
    values[i] = as_double(stored<T>(number(kValue, at)));
  }
  const std::int64_t token = bed.starts[static_cast<std::size_t>(sample.sequence)] + sample.token;
  for (int g = 0; g < c.group; ++g) {
    const std::int64_t row = (token * bed.heads() + sample.head * c.group + g) * c.dim;
    std::vector<double> q(dim), x(count);
    std::vector<float> xf(count);
    for (std::size_t d = 0; d < dim; ++d) {
      const auto at = static_cast<std::uint64_t>(row) + d;
      q[d] = as_double(stored<T>(bed.scale_of_q * number(kQuery, at)));
    }
    double top = -INFINITY;
    float top_f = -INFINITY;
    for (std::size_t p = 0; p < count; ++p) {
      double sum = 0;
      float sum_f = 0;
      for (std::size_t d = 0; d < dim; ++d) {
        sum += q[d] * keys[p * dim + d];
        sum_f += static_cast<float>(q[d] * keys[p * dim + d]);
      }
      x[p] = bed.params.scale * sum;
      xf[p] = bed.params.scale * sum_f;
      top = std::max(top, x[p]);
      top_f = std::max(top_f, xf[p]);
    }
    double total = 0;
    float total_f = 0;
    std::vector<double> exact(dim), honest(dim);
    for (std::size_t p = 0; p < count; ++p) {
      const double weight = std::exp(x[p] - top);
      const float weight_f = std::exp(xf[p] - top_f);
      total += weight;
      total_f += weight_f;
      const double weight_stored = rounded<T>(static_cast<double>(weight_f));
      for (std::size_t d = 0; d < dim; ++d) {
        exact[d] += weight * values[p * dim + d];
        honest[d] += weight_stored * values[p * dim + d];
      }
    }
    for (std::size_t d = 0; d < dim; ++d) {
      const std::size_t at = static_cast<std::size_t>(g) * dim + d;
      findings.o.push_back({as_double(sample.got[at]), count == 0 ? 0 : exact[d] / total,
                            count == 0 ? 0 : rounded<T>(honest[d] / static_cast<double>(total_f))});
    }
    findings.lse.push_back(
        {static_cast<double>(sample.got_lse[static_cast<std::size_t>(g)]),
         count == 0 ? -INFINITY : top + std::log(total),
         count == 0 ? -INFINITY : static_cast<double>(top_f + std::log(total_f))});
  }
}

// Every stride-th token of the packed axis and the last one of each sequence.
template <typename T>
std::vector<Sample<T>> take_samples(const Bed<T>& bed, int stride) {
  const Case& c = bed.test;
  const std::vector<T> o = stride == 1 ? bed.o->host() : std::vector<T>();
  const std::vector<float> lse = bed.lse->host();
  std::vector<Sample<T>> samples;
  for (std::size_t b = 0; b < c.sequences.size(); ++b) {
    const int tokens = c.sequences[b].tokens;
    for (int i = 0; i < tokens; ++i) {
      const std::int64_t token = bed.starts[b] + i;
      if (token % stride != 0 && i + 1 != tokens) continue;
      for (int h = 0; h < c.heads_kv; ++h) {
        Sample<T> sample{static_cast<int>(b), i, h, {}, {}, {}};
        const std::int64_t at = (token * bed.heads() + h * c.group) * c.dim;
        const std::int64_t n = std::int64_t{c.group} * c.dim;
        if (stride == 1) {
          sample.got.assign(o.begin() + at, o.begin() + at + n);
        } else {
          sample.got = bed.o->host(at, n);
        }
        for (int g = 0; g < c.group; ++g) {
          sample.got_lse.push_back(
              lse[static_cast<std::size_t>((std::int64_t{h} * c.group + g) * bed.tokens + token)]);
        }
        if (bed.params.selection != nullptr) {
          const std::int64_t columns = bed.params.columns;
          sample.chosen =
              bed.d_selection->host((std::int64_t{h} * bed.tokens + token) * columns, columns);
        }
        samples.push_back(std::move(sample));
      }
    }
  }
  return samples;
}

// The worst share of the budget; numbers beyond it, and numbers that are not numbers, in `bad`.
inline double worst_share(const std::vector<Number>& numbers, int mantissa_bits, double& bad,
                          double& rms) {
  const auto ulp = [&](double x) {
    return std::ldexp(1.0, std::max(std::ilogb(std::max(std::abs(x), 1e-30)), -14) - mantissa_bits);
  };
  double rounding = 0, squares = 0, honest_squares = 0, ulp_squares = 0, worst = 0;
  for (const Number& n : numbers) {
    if (std::isfinite(n.exact)) rounding = std::max(rounding, std::abs(n.honest - n.exact));
  }
  for (const Number& n : numbers) {
    if (n.got == n.exact) continue;  // also infinities
    const double share = std::abs(n.got - n.exact) / (2 * rounding + ulp(n.exact));
    if (!(share <= 1)) bad += 1;
    worst = std::isnan(share) ? INFINITY : std::max(worst, share);
    squares += (n.got - n.exact) * (n.got - n.exact);
    honest_squares += (n.honest - n.exact) * (n.honest - n.exact);
    ulp_squares += ulp(n.exact) * ulp(n.exact);
  }
  const double budget = 2 * std::sqrt(honest_squares) + std::sqrt(ulp_squares);
  rms = squares == 0 ? 0 : std::sqrt(squares) / budget;
  return worst;
}

// Prints one line; true if everything is within the budget.
template <typename T>
bool check(const Bed<T>& bed, const std::string& what, int stride = 1) {
  const std::vector<Sample<T>> samples = take_samples(bed, stride);
  const std::size_t threads = std::max(1u, std::thread::hardware_concurrency());
  std::vector<Findings> parts(threads);
  std::vector<std::thread> pool;
  for (std::size_t n = 0; n < threads; ++n) {
    pool.emplace_back([&, n] {
      for (std::size_t i = n; i < samples.size(); i += threads) {
        examine(bed, samples[i], parts[n]);
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
  Findings all;
  for (const Findings& part : parts) {
    all.o.insert(all.o.end(), part.o.begin(), part.o.end());
    all.lse.insert(all.lse.end(), part.lse.begin(), part.lse.end());
  }
  double bad = 0, rms = 0, rms_lse = 0;
  const double worst = worst_share(all.o, std::is_same_v<T, __half> ? 10 : 7, bad, rms);
  const double worst_lse = worst_share(all.lse, 23, bad, rms_lse);
  const bool ok = bad == 0 && rms <= 1 && rms_lse <= 1;
  std::printf("%s %s %s: %zu numbers, share of budget: worst %.2f, rms %.2f, lse %.2f\n",
              ok ? "ok  " : "FAIL", bed.test.name.c_str(), what.c_str(), all.o.size(), worst, rms,
              worst_lse);
  return ok;
}

}  // namespace infllm::cuda::testing
