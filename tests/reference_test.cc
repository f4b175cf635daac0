// SPDX-License-Identifier: Apache-2.0
//
// The reference proves itself: against a second transcription of the algorithm that shares no code
// with it, and against identities. reference_gradients_test.cc does it for the way back.
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "infllm/backend/open.h"
#include "infllm/backend/reference/rounding.h"
#include "tests/support/grid.h"

namespace infllm::testing {
namespace {

using Rows = std::vector<std::vector<double>>;  // [tokens][D]

// The algorithm of one sequence and one KV head, straight from the description, on plain vectors.
struct Oracle {
  SparseConfig c;
  double scale;
  DType kv;
  Rows K, V, K_score;

  struct Out {
    std::vector<std::int64_t> selected;
    Rows O;                   // [G][D]
    std::vector<double> LSE;  // [G]
  };

  static double inner(const std::vector<double>& a, const std::vector<double>& b) {
    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
  }

  std::vector<double> mean(std::int64_t first, std::int64_t count) const {
    std::vector<double> sum(K[0].size(), 0.0);
    for (std::int64_t t = first; t < first + count; ++t) {
      for (std::size_t d = 0; d < sum.size(); ++d) sum[d] += K_score[t][d];
    }
    for (double& x : sum) x = reference::round_to(kv, x / static_cast<double>(count));
    return sum;
  }

  std::vector<std::int64_t> choose(const Rows& q, std::int64_t p) const {
    const std::int64_t B = c.block_size;
    const std::int64_t W = c.window_size / B;
    const std::int64_t T = c.topk + W;
    const std::int64_t qb = p / B;
    std::vector<std::int64_t> all(static_cast<std::size_t>(qb + 1));
    std::iota(all.begin(), all.end(), 0);
    if (qb + 1 <= T) return all;

    const auto windows = [](std::int64_t n, std::int64_t l, std::int64_t s) {
      return n < l ? 0 : (n - l) / s + 1;
    };
    const std::int64_t v1 = windows(p + 1, c.kernel_size, c.kernel_stride);
    const std::int64_t v2 = windows(p + 1, 4 * c.kernel_size, 4 * c.kernel_stride);
    std::vector<double> S(static_cast<std::size_t>(v1), 0.0);
    for (const std::vector<double>& query : q) {
      std::vector<double> fine, norm;
      for (std::int64_t j = 0; j < v1; ++j) {
        fine.push_back(scale * inner(mean(c.kernel_stride * j, c.kernel_size), query));
      }
      for (std::int64_t m = 0; m < v2; ++m) {
        norm.push_back(scale * inner(mean(4 * c.kernel_stride * m, 4 * c.kernel_size), query));
      }
      if (c.lse_source == LseSource::kFine) norm = fine;
      if (norm.empty()) continue;
      const double M = *std::max_element(norm.begin(), norm.end());
      double Z = 0;
      for (const double a : norm) Z += std::exp(a - M);
      for (std::int64_t j = 0; j < v1; ++j) S[j] += std::exp(fine[j] - M) / Z;
    }
    if (c.score_rounding == ScoreRounding::kBF16) {
      for (double& s : S) s = round_to_bf16(s);
    }
    const std::int64_t last_free = qb - W - (c.legacy_window ? -1 : 0);  // blocks before are free
    std::vector<double> R;
    for (std::int64_t b = 0; b <= qb; ++b) {
      double best = -INFINITY;
      // Every window that shares a token with the block.
      for (std::int64_t j = 0; j < v1; ++j) {
        const std::int64_t first = c.kernel_stride * j;
        if (first < (b + 1) * B && first + c.kernel_size > b * B) best = std::max(best, S[j]);
      }
      R.push_back(b < c.init_blocks || b >= last_free ? INFINITY : best);
    }
    std::stable_sort(all.begin(), all.end(), [&](auto a, auto b) { return R[a] > R[b]; });
    all.resize(static_cast<std::size_t>(T));
    std::sort(all.begin(), all.end());
    return all;
  }

  Out attend(const Rows& q, const std::vector<std::int64_t>& selected, std::int64_t p) const {
    Out out{.selected = selected};
    std::vector<std::int64_t> cols;
    for (const std::int64_t b : selected) {
      for (std::int64_t t = b * c.block_size; t <= std::min((b + 1) * c.block_size - 1, p); ++t) {
        cols.push_back(t);
      }
    }
    for (const std::vector<double>& query : q) {
      double largest = -INFINITY;
      for (const std::int64_t t : cols) largest = std::max(largest, scale * inner(K[t], query));
      double total = 0;
      std::vector<double> o(query.size(), 0.0);
      for (const std::int64_t t : cols) {
        const double e = std::exp(scale * inner(K[t], query) - largest);
        total += e;
        for (std::size_t d = 0; d < o.size(); ++d) o[d] += e * V[t][d];
      }
      for (double& x : o) x /= total;
      out.O.push_back(o);
      out.LSE.push_back(largest + std::log(total));
    }
    return out;
  }
};

Oracle oracle_of(const Rig& rig, const SequenceNumbers& numbers, std::int32_t head, DType kv) {
  const Case& c = rig.test_case();
  Oracle oracle{.c = c.config, .scale = static_cast<double>(rig.scale()), .kv = kv};
  const auto rows = [&](const std::vector<double>& all) {
    Rows out;
    const std::int64_t width = std::int64_t{c.heads_kv} * c.head_dim;
    for (std::int64_t at = head * c.head_dim; at < static_cast<std::int64_t>(all.size());
         at += width) {
      std::vector<double> row(all.begin() + at, all.begin() + at + c.head_dim);
      for (double& x : row) x = reference::round_to(kv, x);
      out.push_back(std::move(row));
    }
    return out;
  };
  oracle.K = rows(numbers.k);
  oracle.V = rows(numbers.v);
  oracle.K_score = c.config.use_nope ? rows(numbers.k_score) : oracle.K;
  return oracle;
}

class ReferenceOracle : public ::testing::TestWithParam<std::string> {};

TEST_P(ReferenceOracle, AgreesWithALiteralTranscription) {
  const Case& c = case_named(GetParam());
  for (const DType kv : {DType::kF64, DType::kBF16}) {
    Rig rig(open("reference"), c, kv);
    rig.enter(c.steps.back());
    std::vector<std::int32_t> chosen;
    if (rig.batch().any_sparse) chosen = rig.select(rig.score());
    const Attended out = rig.attention();
    std::int32_t token = 0;
    for (std::int32_t s = 0; s < c.sequences(); ++s) {
      for (std::int32_t g = 0; g < c.heads_kv; ++g) {
        const Oracle oracle = oracle_of(rig, rig.numbers()[s], g, kv);
        // The first and last tokens, and some between: the transcription is slow.
        const Span span = c.steps.back()[s];
        const std::int32_t stride = std::max(1, (span.end - span.first - 1) / 3);
        for (std::int32_t i = 0; i < span.end - span.first; i += stride) {
          const std::int64_t p = span.first + i;
          const auto queries = [&](Queries which) {
            std::vector<double> all;
            append_queries(c, s, p, which, DType::kF32, all);
            Rows rows;
            for (std::int32_t h = 0; h < c.group(); ++h) {
              const auto from = all.begin() + (g * c.group() + h) * c.head_dim;
              rows.emplace_back(from, from + c.head_dim);
            }
            return rows;
          };
          std::vector<std::int64_t> want(static_cast<std::size_t>(p / c.config.block_size + 1));
          std::iota(want.begin(), want.end(), 0);
          if (rig.sparse(token + i)) {
            want =
                oracle.choose(queries(c.config.use_nope ? Queries::kScore : Queries::kAttend), p);
            const auto row =
                chosen.begin() + (std::int64_t{g} * rig.tokens() + token + i) * rig.columns();
            std::vector<std::int64_t> got;
            for (std::int32_t k = 0; k < rig.columns() && row[k] >= 0; ++k) got.push_back(row[k]);
            ASSERT_EQ(got, want) << GetParam() << " position " << p;
          }
          const Oracle::Out expected = oracle.attend(queries(Queries::kAttend), want, p);
          for (std::int32_t h = 0; h < c.group(); ++h) {
            const std::int32_t head = g * c.group() + h;
            const std::int64_t at = (std::int64_t{token + i} * c.heads_q + head) * c.head_dim;
            // Sums of at most some thousand terms of order one, in another order.
            const double rounding = 1e4 * 0x1p-53;
            for (std::int32_t d = 0; d < c.head_dim; ++d) {
              ASSERT_NEAR(out.o[at + d], expected.O[h][d], rounding);
            }
            ASSERT_NEAR(out.lse[std::int64_t{head} * rig.tokens() + token + i], expected.LSE[h],
                        rounding * std::fabs(expected.LSE[h]) + rounding);
          }
        }
      }
      token += c.steps.back()[s].end - c.steps.back()[s].first;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, ReferenceOracle,
                         ::testing::Values("edges_prefill", "budget_edge", "dense_len_edge",
                                           "group_7", "legacy_window", "use_nope", "fine_lse",
                                           "no_score_rounding", "no_sink", "no_window",
                                           "windows_16_8", "windows_48_16", "windows_16_16"),
                         [](const auto& param) { return param.param; });

// Shapes that tuned columns refuse: this one takes any that check() lets pass.
TEST(Reference, TakesAnyShape) {
  Case c = case_named("group_7");
  c.name = "odd_shape";
  c.head_dim = 20;
  c.config.block_size = 96;
  c.config.kernel_size = 36;
  c.config.kernel_stride = 12;
  c.config.window_size = 192;
  Rig rig(open("reference"), c, DType::kF16);
  rig.enter(c.steps[0]);
  const std::vector<std::int32_t> chosen = rig.select(rig.score());
  const Oracle oracle = oracle_of(rig, rig.numbers()[4], 1, DType::kF16);
  const std::int64_t p = c.steps[0][4].end - 1;
  std::vector<double> all;
  append_queries(c, 4, p, Queries::kAttend, DType::kF32, all);
  Rows queries;
  for (std::int32_t h = c.group(); h < c.heads_q; ++h) {
    queries.emplace_back(all.begin() + h * c.head_dim, all.begin() + (h + 1) * c.head_dim);
  }
  const std::vector<std::int64_t> want = oracle.choose(queries, p);
  const std::vector<std::int64_t> got(chosen.end() - rig.columns(), chosen.end());
  EXPECT_EQ(got, want);
}

// However a prompt arrives, the reference computes the same numbers, bit by bit.
TEST(Reference, PiecesAreTheWhole) {
  for (const char* name : {"chunked", "token_by_token", "first_tokens"}) {
    const Case& c = case_named(name);
    const std::int32_t first = c.steps.front()[0].first;
    const Step whole(static_cast<std::size_t>(c.sequences()), Span{first, c.length(0)});
    Rig at_once(open("reference"), c, DType::kBF16);
    at_once.enter(whole);
    const Attended want = at_once.attention();
    const std::int64_t row = std::int64_t{c.heads_q} * c.head_dim;
    Rig in_pieces(open("reference"), c, DType::kBF16);
    for (const Step& step : c.steps) {
      in_pieces.enter(step);
      const Attended got = in_pieces.attention();
      const std::int64_t tokens = step[0].end - step[0].first;
      for (std::int32_t s = 0; s < c.sequences(); ++s) {
        const auto from =
            want.o.begin() + (s * (c.length(0) - first) + step[0].first - first) * row;
        ASSERT_TRUE(std::equal(from, from + tokens * row, got.o.begin() + s * tokens * row))
            << name << " at " << step[0].first;
      }
    }
  }
}

// A rounded reference rounds: the exact one would make a budget of nothing.
TEST(Reference, RoundedDiffersFromExactByTheTypesPrecision) {
  const Case& c = case_named("group_2_dim_128");
  Rig exact(open("reference"), c, DType::kBF16);
  exact.enter(c.steps[0]);
  const std::vector<std::int32_t> chosen = exact.select(exact.score());
  const Attended want = exact.attend(chosen);
  double last = 0;
  for (const char* name : {"reference:f32", "reference:f16", "reference:bf16"}) {
    Rig rounded(open(name), c, DType::kBF16);
    rounded.enter(c.steps[0]);
    const Attended got = rounded.attend(chosen);
    double worst = 0;
    for (std::size_t i = 0; i < got.o.size(); ++i) {
      worst = std::max(worst, std::fabs(got.o[i] - want.o[i]));
    }
    EXPECT_GT(worst, 4 * last) << name;  // f16 has 8192 times, bf16 8 times the last one's step
    EXPECT_LT(worst, 0x1p-5) << name;
    last = worst;
  }
}

}  // namespace
}  // namespace infllm::testing
