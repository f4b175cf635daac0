// SPDX-License-Identifier: Apache-2.0
//
// The decode rows in float64 on the host, and the judgement of what a device computed. Budgets are
// derived: a logit of D products in f32 is off by at most D 2^-23 sum |q k| scale; outputs may be
// off by twice what rounding the weights to the cache's type costs, and one unit in the last place.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "tests/cuda/decode_case.cuh"

namespace infllm::decode_check {

inline constexpr double kInf = HUGE_VAL;

inline double to_double(std::uint16_t bits, DType dtype) {
  if (dtype == DType::kF16) return __half2float(__half(__half_raw{bits}));
  return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}));
}
inline double rounded(double x, DType dtype) {
  return dtype == DType::kF16 ? __half2float(__double2half(x))
                              : __bfloat162float(__double2bfloat16(x));
}
inline double ulp(double x, DType dtype) {
  const int bits = dtype == DType::kF16 ? 10 : 7;
  int exponent = 0;
  std::frexp(x, &exponent);
  return std::ldexp(1.0, std::max(exponent - 1 - bits, dtype == DType::kF16 ? -24 : -133));
}

struct Verdict {
  int selection_rows = 0, selection_wrong = 0, selection_differs = 0;
  int outputs_wrong = 0, lse_wrong = 0;
  double worst = 0;  // |error| / budget of o
  std::string first;
  bool good() const { return selection_wrong + outputs_wrong + lse_wrong == 0; }
};

class Reference {
 public:
  explicit Reference(const Case& c)
      : c_(c), s_(c.shape), map_(c.pools[0].layout), memory_(c.memory.host()), q_(c.q.host()) {}

  Verdict judge() const {
    Verdict v;
    const std::vector<std::int32_t> selection = c_.selection.host();
    const std::vector<std::uint16_t> o = c_.o.host();
    const std::vector<float> lse = c_.lse.host();
    std::mutex mutex;
    std::atomic<int> next{0};
    const int jobs = static_cast<int>(s_.lengths.size()) * s_.heads_kv;
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < std::max(1u, std::thread::hardware_concurrency()); ++t) {
      threads.emplace_back([&] {
        for (int job = next++; job < jobs; job = next++) {
          Verdict one;
          judge_row(job / s_.heads_kv, job % s_.heads_kv, selection, o, lse, one);
          const std::lock_guard lock(mutex);
          v.selection_rows += one.selection_rows;
          v.selection_wrong += one.selection_wrong;
          v.selection_differs += one.selection_differs;
          v.outputs_wrong += one.outputs_wrong;
          v.lse_wrong += one.lse_wrong;
          v.worst = std::max(v.worst, one.worst);
          if (v.first.empty()) v.first = one.first;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    return v;
  }

 private:
  bool has_page(int sequence, int block) const {
    const std::int32_t page =
        c_.host_table[static_cast<std::size_t>(sequence) * c_.batch.max_pages + block];
    return page >= 0 && page < c_.pools[0].num_pages;
  }
  // Element i of the plane at `offset` of the page of `block`.
  double at(int sequence, int block, std::int64_t offset, std::int64_t i) const {
    const std::int64_t page =
        c_.host_table[static_cast<std::size_t>(sequence) * c_.batch.max_pages + block];
    const auto* plane = reinterpret_cast<const std::uint16_t*>(
        memory_.data() + page * c_.pools[0].page_bytes + offset);
    return to_double(plane[i], s_.dtype);
  }
  std::vector<double> query(int token, int head) const {
    std::vector<double> q(s_.head_dim);
    for (int d = 0; d < s_.head_dim; ++d) {
      q[d] = to_double(q_[(static_cast<std::size_t>(token) * s_.heads_q + head) * s_.head_dim + d],
                       s_.dtype);
    }
    return q;
  }
  double logit(const std::vector<double>& q, int sequence, int block, std::int64_t offset, int row,
               double& magnitude) const {
    double sum = 0, absolute = 0;
    for (int d = 0; d < s_.head_dim; ++d) {
      const double product = q[d] * at(sequence, block, offset, row * s_.head_dim + d);
      sum += product;
      absolute += std::fabs(product);
    }
    magnitude = std::max(magnitude, absolute * c_.scale());
    return sum * c_.scale();
  }

  // R of all blocks before the local window, and by what share they may be off.
  std::vector<double> block_scores(int sequence, int group, int token, int end,
                                   double& share) const {
    const int length = c_.host_lengths[sequence];
    const int fine = cuda::fine_windows(length), coarse = cuda::coarse_windows(length);
    const bool from_coarse = s_.config.lse_source == LseSource::kCoarse;
    const int heads = s_.heads_q / s_.heads_kv;
    std::vector<double> sums(fine, 0.0);
    double magnitude = 0;
    for (int h = group * heads; h < (group + 1) * heads; ++h) {
      const std::vector<double> q = query(token, h);
      std::vector<double> a(fine), n(from_coarse ? coarse : fine);
      for (int j = 0; j < fine; ++j) {
        a[j] = has_page(sequence, j / 4)
                   ? logit(q, sequence, j / 4, map_.fine(group), j % 4, magnitude)
                   : -kInf;
      }
      for (int m = 0; m < static_cast<int>(n.size()); ++m) {
        if (!from_coarse) {
          n[m] = a[m];
        } else {
          n[m] = has_page(sequence, m) ? logit(q, sequence, m, map_.coarse(group), 0, magnitude)
                                       : -kInf;
        }
      }
      if (n.empty()) continue;
      const double top = *std::max_element(n.begin(), n.end());
      double z = 0;
      for (const double x : n) z += std::exp(x - top);
      for (int j = 0; j < fine; ++j) sums[j] += std::exp(a[j] - top) / z;
    }
    share = std::expm1(2 * s_.head_dim * 0x1p-23 * magnitude) + 128 * 0x1p-23;
    std::vector<double> scores(end, -kInf);
    for (int b = 0; b < end; ++b) {
      for (int j = std::max(0, 4 * b - 1); j < std::min(4 * b + 4, fine); ++j) {
        if (has_page(sequence, j / 4)) scores[b] = std::max(scores[b], sums[j]);
      }
    }
    return scores;
  }

  void complain(Verdict& v, int sequence, int group, const std::string& what) const {
    if (!v.first.empty()) return;
    v.first = "sequence " + std::to_string(sequence) + " of " +
              std::to_string(c_.host_lengths[sequence]) + " keys, KV head " +
              std::to_string(group) + ": " + what;
  }

  // Returns the blocks to attend to.
  std::vector<int> judge_selection(int sequence, int group, int token, const std::int32_t* chosen,
                                   Verdict& v) const {
    const SparseConfig& config = s_.config;
    const int columns = c_.select(0).columns();
    const int own = (c_.host_lengths[sequence] - 1) / 64;
    ++v.selection_rows;
    std::vector<int> got;
    bool ordered = true;
    for (int i = 0; i < columns; ++i) {
      if (chosen[i] < 0) {
        ordered &= chosen[i] == -1;
        continue;
      }
      ordered &= static_cast<int>(got.size()) == i && chosen[i] <= own &&
                 (i == 0 || chosen[i] > chosen[i - 1]);
      if (chosen[i] <= own) got.push_back(chosen[i]);
    }
    const int want = std::min(columns, own + 1);
    bool right = ordered && static_cast<int>(got.size()) == want;
    if (own + 1 > columns && right) {
      const int first_local = std::max(0, own - config.local_blocks() + 1);
      double share = 0;
      const std::vector<double> scores = block_scores(sequence, group, token, first_local, share);
      // In order of preference: own block, local ones from near to far, sinks, then by score.
      std::vector<int> forced;
      for (int b = own; b >= first_local; --b) forced.push_back(b);
      for (int b = 0; b < std::min(config.init_blocks, first_local); ++b) forced.push_back(b);
      forced.resize(std::min<std::size_t>(forced.size(), columns));
      const auto has = [&](const std::vector<int>& in, int b) {
        return std::find(in.begin(), in.end(), b) != in.end();
      };
      for (const int b : forced) right &= has(got, b);
      const double unit = config.score_rounding == ScoreRounding::kBF16 ? 0x1p-8 : 0;
      double least = kInf, most = -kInf;
      std::vector<int> best;
      for (int b = config.init_blocks; b < first_local; ++b) {
        (has(got, b) ? least : most) =
            has(got, b) ? std::min(least, scores[b]) : std::max(most, scores[b]);
        best.push_back(b);
      }
      const std::size_t free = columns - forced.size();
      if (free > 0) {
        right &= least >= most * (1 - unit) * (1 - 2 * share);
        // Ties of what is bitwise the same go to the lower index.
        const auto value = [&](int b) {
          return unit > 0 ? rounded(scores[b], DType::kBF16) : scores[b];
        };
        std::stable_sort(best.begin(), best.end(),
                         [&](int x, int y) { return value(x) > value(y); });
        best.resize(free);
        bool same = true;
        for (const int b : best) same &= has(got, b);
        v.selection_differs += same ? 0 : 1;
        if (s_.content != Content::kNatural) right &= same;
      }
    }
    if (!right) {
      ++v.selection_wrong;
      std::string list;
      for (int i = 0; i < std::min(columns, 12); ++i) list += std::to_string(chosen[i]) + ' ';
      complain(v, sequence, group, "selection begins with " + list);
    }
    return got;
  }

  void judge_row(int sequence, int group, const std::vector<std::int32_t>& selection,
                 const std::vector<std::uint16_t>& o, const std::vector<float>& lse,
                 Verdict& v) const {
    if (s_.lengths[sequence] == 0) return;
    const int token = c_.host_start[sequence];
    const int length = c_.host_lengths[sequence];
    std::vector<int> blocks;
    if (c_.host_sparse[sequence] != 0) {
      const int columns = c_.select(0).columns();
      const std::int32_t* chosen =
          selection.data() + (static_cast<std::int64_t>(group) * c_.tokens + token) * columns;
      blocks = judge_selection(sequence, group, token, chosen, v);
    } else {
      for (int b = 0; b < (length + 63) / 64; ++b) blocks.push_back(b);
    }
    std::erase_if(blocks, [&](int b) { return !has_page(sequence, b); });
    const int heads = s_.heads_q / s_.heads_kv;
    std::vector<double> x;
    for (int h = group * heads; h < (group + 1) * heads; ++h) {
      const std::vector<double> q = query(token, h);
      double magnitude = 0;
      x.clear();
      for (const int b : blocks) {
        for (int t = 0; t < std::min(64, length - 64 * b); ++t) {
          x.push_back(logit(q, sequence, b, map_.key(group), t, magnitude));
        }
      }
      const double top = *std::max_element(x.begin(), x.end());
      double z = 0;
      for (double& e : x) z += e = std::exp(e - top);
      std::vector<double> exact(s_.head_dim, 0.0), honest(s_.head_dim, 0.0);
      std::size_t i = 0;
      for (const int b : blocks) {
        for (int t = 0; t < std::min(64, length - 64 * b); ++t, ++i) {
          const double weight = rounded(x[i], s_.dtype);
          for (int d = 0; d < s_.head_dim; ++d) {
            const double value = at(sequence, b, map_.value(group), t * s_.head_dim + d);
            exact[d] += x[i] * value;
            honest[d] += weight * value;
          }
        }
      }
      double error = 0;
      for (int d = 0; d < s_.head_dim; ++d) {
        exact[d] /= z;
        error = std::max(error, std::fabs(rounded(honest[d] / z, s_.dtype) - exact[d]));
      }
      const std::size_t row = static_cast<std::size_t>(token) * s_.heads_q + h;
      for (int d = 0; d < s_.head_dim; ++d) {
        const double got = to_double(o[row * s_.head_dim + d], s_.dtype);
        const double budget = 2 * error + ulp(exact[d], s_.dtype);
        const double off = std::fabs(got - exact[d]) / budget;
        v.worst = std::max(v.worst, std::isfinite(off) ? off : 1e30);
        if (off <= 1) continue;
        ++v.outputs_wrong;
        complain(v, sequence, group,
                 "head " + std::to_string(h) + " element " + std::to_string(d) + " is " +
                     std::to_string(got) + ", expected " + std::to_string(exact[d]) + " within " +
                     std::to_string(budget));
      }
      const double want = top + std::log(z);
      const double got = lse[static_cast<std::size_t>(h) * c_.tokens + token];
      const double budget =
          s_.head_dim * 0x1p-23 * magnitude + 16 * 0x1p-23 * (1 + std::fabs(want));
      if (!(std::fabs(got - want) <= budget)) {
        ++v.lse_wrong;
        complain(v, sequence, group,
                 "LSE of head " + std::to_string(h) + " is " + std::to_string(got) + ", expected " +
                     std::to_string(want));
      }
    }
  }

  const Case& c_;
  const Shape& s_;
  cuda::PageMap map_;
  std::vector<std::byte> memory_;
  std::vector<std::uint16_t> q_;
};

}  // namespace infllm::decode_check
