// SPDX-License-Identifier: Apache-2.0
//
// Whether a selection is right. Every row's form: ascending, forced blocks, -1 behind them; ties to
// the lowest blocks; the same twice and with each sequence alone. Sampled rows by value: their
// scores are computed in double, and in float for the error that an honest kernel may make; no
// block that was left out may beat one that was chosen by more than twice that error and an ulp of
// the compared type (tests/support/grid.h, well_chosen).
#pragma once

#include "tests/cuda/score_select_step.cuh"

namespace infllm::cuda {

// Scores of single rows, straight from the equations of ops/score.h: S to sums, R to scores.
template <typename Real, typename T>
__global__ void reference_rows(PagePool pool, Batch batch, SparseConfig config, int group, int dim,
                               double scale, const T* q, const int* rows, Real* sums,
                               std::int64_t sums_stride, double* scores, std::int64_t blocks) {
  const int sequence_index = rows[3 * blockIdx.x];
  const int head = rows[3 * blockIdx.x + 1];
  const int position = rows[3 * blockIdx.x + 2];
  const Sequence sequence(batch, sequence_index);
  __shared__ Real query[16 * 128];
  __shared__ Real reduced[256];
  const std::int64_t token = sequence.first_token + position - sequence.first_position();
  for (int i = static_cast<int>(threadIdx.x); i < group * dim; i += blockDim.x) {
    query[i] =
        static_cast<Real>(static_cast<float>(q[(token * pool.map.heads + head) * group * dim + i]));
  }
  __syncthreads();
  const auto logit = [&](int h, const T* key) {
    Real sum = 0;
    for (int d = 0; d < dim; ++d)
      sum += query[h * dim + d] * static_cast<Real>(static_cast<float>(key[d]));
    return static_cast<Real>(scale) * sum;
  };
  const auto fine_key = [&](int j) {
    return pool.plane<const T>(sequence.page(j / 4, pool.num_pages), pool.map.fine(head)) +
           j % 4 * dim;
  };
  const auto coarse_key = [&](int m) {
    return pool.plane<const T>(sequence.page(m, pool.num_pages), pool.map.coarse(head));
  };
  const bool coarse = config.lse_source == LseSource::kCoarse;
  const int visible = fine_windows(position + 1);
  const int count = coarse ? coarse_windows(position + 1) : visible;
  const auto reduce = [&](Real mine, bool maximum) {
    reduced[threadIdx.x] = mine;
    __syncthreads();
    for (int n = 128; n > 0; n /= 2) {
      if (threadIdx.x < n) {
        const Real a = reduced[threadIdx.x];
        const Real b = reduced[threadIdx.x + n];
        reduced[threadIdx.x] = maximum ? max(a, b) : a + b;
      }
      __syncthreads();
    }
    const Real all = reduced[0];
    __syncthreads();
    return all;
  };
  Real* const s = sums + blockIdx.x * sums_stride;
  for (int j = static_cast<int>(threadIdx.x); j < visible; j += 256) s[j] = 0;
  for (int h = 0; h < group && count > 0; ++h) {
    Real most = -INFINITY;
    for (int m = static_cast<int>(threadIdx.x); m < count; m += 256) {
      most = max(most, logit(h, coarse ? coarse_key(m) : fine_key(m)));
    }
    most = reduce(most, true);
    Real sum = 0;
    for (int m = static_cast<int>(threadIdx.x); m < count; m += 256) {
      sum += exp(logit(h, coarse ? coarse_key(m) : fine_key(m)) - most);
    }
    sum = reduce(sum, false);
    for (int j = static_cast<int>(threadIdx.x); j < visible; j += 256) {
      s[j] += exp(logit(h, fine_key(j)) - most) / sum;
    }
  }
  __syncthreads();
  for (int b = static_cast<int>(threadIdx.x); b < blocks; b += 256) {
    Real best = -INFINITY;
    for (int j = max(0, 4 * b - 1); j < min(4 * b + 4, visible); ++j) best = max(best, s[j]);
    scores[blockIdx.x * blocks + b] = best;
  }
}

template <typename T>
class Judge {
 public:
  explicit Judge(Step<T>& step) : step_(step), case_(step.test_case()) {}

  // What is wrong, or nothing.
  std::string check() {
    const std::vector<std::int32_t> chosen = step_.select();
    if (chosen != step_.select()) return "two runs differ";
    std::string problem = check_alone(chosen);
    if (!problem.empty()) return problem;

    std::vector<std::int32_t> rows;  // sequence, head, position
    std::mt19937 random(7);
    const std::int64_t all = std::int64_t{case_.heads_kv} * step_.params().score.batch.num_tokens;
    for (int b = 0; b < step_.params().score.batch.num_sequences; ++b) {
      for (int i = 0; i < case_.tokens[b]; ++i) {
        for (int g = 0; g < case_.heads_kv; ++g) {
          const int p = case_.lengths[b] - case_.tokens[b] + i;
          const std::int32_t* row = step_.row(chosen, b, g, p);
          if (is_dense(b)) {
            for (int c = 0; c < step_.columns(); ++c) {
              if (row[c] != 0x55555555) return text("dense sequence %d was written", b);
            }
            continue;
          }
          problem = check_form(row, p);
          if (!problem.empty()) return text("seq %d head %d pos %d: %s", b, g, p, problem.c_str());
          if (!case_.config.selects_all_at(p) && random() % all < unsigned(case_.samples)) {
            rows.insert(rows.end(), {b, g, p});
          }
        }
      }
    }
    return judge(chosen, rows);
  }

  // The same of a few rows of the first sequence, as the last launch selected them.
  std::string check_some(int count) {
    const std::vector<std::int32_t> chosen = step_.selection();
    std::vector<std::int32_t> rows;
    std::mt19937 random(11);
    const int first = case_.lengths[0] - case_.tokens[0];
    while (static_cast<int>(rows.size()) < 3 * count) {
      const int g = static_cast<int>(random() % case_.heads_kv);
      const int p = first + static_cast<int>(random() % case_.tokens[0]);
      if (case_.config.selects_all_at(p)) continue;
      const std::string problem = check_form(step_.row(chosen, 0, g, p), p);
      if (!problem.empty()) return text("head %d pos %d: %s", g, p, problem.c_str());
      rows.insert(rows.end(), {0, g, p});
    }
    return judge(chosen, rows);
  }

  std::int64_t judged() const { return judged_; }

 private:
  // Every sequence gives the same when it is the only one of its step.
  std::string check_alone(const std::vector<std::int32_t>& chosen) {
    const std::int64_t columns = step_.columns();
    for (int b = 0; b < static_cast<int>(case_.lengths.size()); ++b) {
      if (case_.lengths.size() == 1 || case_.tokens[b] == 0 || is_dense(b)) continue;
      const std::vector<std::int32_t> alone = step_.select_alone(b);
      const std::int64_t k =
          static_cast<std::int64_t>(alone.size()) / case_.heads_kv / case_.tokens[b];
      for (int g = 0; g < case_.heads_kv; ++g) {
        for (int i = 0; i < case_.tokens[b]; ++i) {
          const std::int32_t* row = step_.row(chosen, b, g, case_.lengths[b] - case_.tokens[b] + i);
          const std::int32_t* own = alone.data() + (std::int64_t{g} * case_.tokens[b] + i) * k;
          for (int c = 0; c < columns; ++c) {
            if (row[c] == (c < k ? own[c] : -1)) continue;
            return text("sequence %d differs alone: token %d column %d is %d", b, i, c, row[c]);
          }
        }
      }
    }
    return {};
  }

  std::string check_form(const std::int32_t* row, int p) const {
    const SparseConfig& config = case_.config;
    const int own = p / config.block_size;
    const int expected = std::min({config.budget_blocks(), step_.columns(), own + 1});
    for (int i = 0; i < step_.columns(); ++i) {
      if (i >= expected && row[i] != -1) return text("column %d is %d, not -1", i, row[i]);
      if (i < expected && (row[i] < 0 || row[i] > own || (i > 0 && row[i] <= row[i - 1]))) {
        return text("column %d is %d", i, row[i]);
      }
    }
    const auto has = [&](int b) { return std::binary_search(row, row + expected, b); };
    int room = expected;
    for (int b = own; b >= config.first_local_block(p) && room > 0; --b, --room) {
      if (!has(b)) return text("local block %d is missing", b);
    }
    for (int b = 0; b < config.init_blocks && b < config.first_local_block(p) && room > 0;
         ++b, --room) {
      if (!has(b)) return text("sink block %d is missing", b);
    }
    if (case_.content == Content::kTies || case_.content == Content::kZero) {
      // All candidates tie, so the lowest ones are chosen.
      const auto local = static_cast<int>(config.first_local_block(p));
      for (int i = 0; i < expected && row[i] < local; ++i) {
        if (row[i] != i) return text("column %d is %d although blocks tie", i, row[i]);
      }
    }
    return {};
  }

  std::string judge(const std::vector<std::int32_t>& chosen,
                    const std::vector<std::int32_t>& rows) {
    const SparseConfig& config = case_.config;
    const auto count = static_cast<std::int64_t>(rows.size() / 3);
    judged_ = count;
    if (count == 0) return {};
    const std::int64_t blocks = step_.params().select.blocks();
    const std::vector<double> exact = reference<double>(rows, blocks);
    const std::vector<double> rounded = reference<float>(rows, blocks);
    const auto free = [&](std::int64_t row, std::int64_t b) {
      return b >= config.init_blocks && b < config.first_local_block(rows[3 * row + 2]);
    };
    double share = 0;
    for (std::int64_t r = 0; r < count; ++r) {
      for (std::int64_t b = 0; b < blocks; ++b) {
        const double e = exact[r * blocks + b];
        if (free(r, b) && e > 1e-30) {
          share = std::max(share, 2 * std::fabs(rounded[r * blocks + b] / e - 1));
        }
      }
    }
    const bool bf16 = config.score_rounding == ScoreRounding::kBF16;
    const auto budget = [&](double x) {
      const double ulp = std::ldexp(1.0, std::ilogb(std::max(x, 1e-37)) - (bf16 ? 7 : 23));
      return share * x + ulp;
    };
    for (std::int64_t r = 0; r < count; ++r) {
      const std::int32_t* row = step_.row(chosen, rows[3 * r], rows[3 * r + 1], rows[3 * r + 2]);
      double lowest_in = INFINITY;
      double highest_out = -INFINITY;
      for (std::int64_t b = 0; b < blocks; ++b) {
        const double e = exact[r * blocks + b];
        if (!free(r, b) || !std::isfinite(e)) continue;
        if (std::find(row, row + step_.columns(), b) != row + step_.columns()) {
          lowest_in = std::min(lowest_in, e + budget(e));
        } else {
          highest_out = std::max(highest_out, e - budget(e));
        }
      }
      if (lowest_in < highest_out) {
        return text(
            "seq %d head %d pos %d: a block of at most %.7g was chosen, one of %.7g was not "
            "(share %.2g)",
            rows[3 * r], rows[3 * r + 1], rows[3 * r + 2], lowest_in, highest_out, share);
      }
    }
    return {};
  }

  template <typename Real>
  std::vector<double> reference(const std::vector<std::int32_t>& rows, std::int64_t blocks) {
    const auto count = static_cast<std::int64_t>(rows.size() / 3);
    const std::int64_t stride = blocks * kFineRows;
    Array<std::int32_t> places(rows);
    Array<Real> sums(static_cast<std::size_t>(count * stride));
    Array<double> scores(static_cast<std::size_t>(count * blocks));
    reference_rows<Real, T><<<static_cast<unsigned>(count), 256>>>(
        PagePool(step_.params().score.pages), step_.params().score.batch, case_.config, case_.group,
        case_.dim, step_.params().score.scale, step_.queries(), places.data(), sums.data(), stride,
        scores.data(), blocks);
    must(cudaDeviceSynchronize());
    return scores.host();
  }

  bool is_dense(int sequence) const { return !case_.sparse.empty() && case_.sparse[sequence] == 0; }

  Step<T>& step_;
  const Case& case_;
  std::int64_t judged_ = 0;
};

}  // namespace infllm::cuda
