// SPDX-License-Identifier: Apache-2.0
//
// The reference proves itself: against a second transcription of the algorithm that shares no code
// with it, against finite differences, and against identities.
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "infllm/backend/open.h"
#include "infllm/backend/reference/rounding.h"
#include "infllm/ops/align.h"
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

// d(sum dO O + sum dLSE LSE) for every q, k and v, against central differences.
TEST(Reference, GradientsAreFiniteDifferences) {
  Case c = case_named("group_7");
  c.name = "gradient";
  c.head_dim = 6;
  c.heads_q = 4;
  c.steps = {{{0, 21}, {0, 0}, {40, 43}}};
  c.config = {.kernel_size = 4,
              .kernel_stride = 2,
              .block_size = 8,
              .window_size = 8,
              .topk = 2,
              .dense_len = -1};
  Rig rig(open("reference"), c, DType::kF64, DType::kF64);
  rig.enter(c.steps[0]);
  const std::vector<std::int32_t> chosen = rig.select(rig.score());
  const std::int64_t query_count = std::int64_t{rig.tokens()} * c.heads_q * c.head_dim;
  const std::int64_t key_count = std::int64_t{21 + 43} * c.heads_kv * c.head_dim;
  const std::int64_t stats = std::int64_t{rig.tokens()} * c.heads_q;
  Random random(3);
  const std::vector<double> grad_o = random.normals(query_count, DType::kF64);
  const std::vector<double> grad_lse = random.normals(stats, DType::kF64);
  std::vector<double> q;
  for (std::int32_t s = 0; s < c.sequences(); ++s) {
    for (std::int64_t t = c.steps[0][s].first; t < c.steps[0][s].end; ++t) {
      append_queries(c, s, t, Queries::kAttend, DType::kF64, q);
    }
  }
  std::vector<double> o(static_cast<std::size_t>(query_count));
  std::vector<double> lse(static_cast<std::size_t>(stats));
  AttendParams forward{.pages = rig.pages(),
                       .batch = rig.batch(),
                       .heads_q = c.heads_q,
                       .scale = rig.scale(),
                       .q = q.data(),
                       .o = o.data(),
                       .lse = lse.data(),
                       .selection = chosen.data(),
                       .columns = rig.columns()};
  const Backend& backend = rig.backend();
  std::vector<std::byte> workspace(1 << 20);
  const auto loss = [&] {
    forward.batch = rig.batch();  // entering a step again renews it
    must(attend(backend, forward, workspace));
    return std::inner_product(o.begin(), o.end(), grad_o.begin(), 0.0) +
           std::inner_product(lse.begin(), lse.end(), grad_lse.begin(), 0.0);
  };
  loss();
  std::vector<double> grad_q(static_cast<std::size_t>(query_count), NAN);
  std::vector<double> grad_k(static_cast<std::size_t>(key_count), NAN);
  std::vector<double> grad_v(static_cast<std::size_t>(key_count), NAN);
  const AttendBackwardParams backward{.forward = forward,
                                      .grad_o = grad_o.data(),
                                      .grad_lse = grad_lse.data(),
                                      .grad_q = grad_q.data(),
                                      .grad_k = grad_k.data(),
                                      .grad_v = grad_v.data()};
  must(attend_backward(backend, backward, workspace));

  // The error of a central difference is h^2 / 6 third derivatives plus rounding / h.
  const double h = 1e-5;
  const double allowed = 1e3 * h * h + 1e2 * 0x1p-53 / h;
  const auto expect_gradient = [&](double gradient, auto&& nudge, const std::string& what) {
    nudge(h);
    const double up = loss();
    nudge(-2 * h);
    const double down = loss();
    nudge(h);
    ASSERT_NEAR(gradient, (up - down) / (2 * h), allowed) << what;
  };
  for (std::int64_t i = 0; i < query_count; i += 7) {
    expect_gradient(
        grad_q[i], [&](double by) { q[i] += by; }, "q " + std::to_string(i));
  }
  const std::int64_t width = std::int64_t{c.heads_kv} * c.head_dim;
  const Step step = c.steps[0];
  const auto nudge_cache = [&](std::vector<double> SequenceNumbers::*plane, std::int32_t s,
                               std::int64_t at) {
    return [&rig, &step, plane, s, at](double by) {
      (rig.numbers()[s].*plane)[at] += by;
      Step again = step;
      for (Span& span : again) span.first = 0;  // append everything again
      rig.enter(again);
      rig.enter(step);
    };
  };
  for (const std::int32_t s : {0, 2}) {
    const std::int64_t offset = s == 0 ? 0 : 21 * width;
    for (std::int64_t at = 0; at < step[s].end * width; at += 11) {
      expect_gradient(grad_k[offset + at], nudge_cache(&SequenceNumbers::k, s, at),
                      "k " + std::to_string(at));
      expect_gradient(grad_v[offset + at], nudge_cache(&SequenceNumbers::v, s, at),
                      "v " + std::to_string(at));
    }
  }
}

// A small model's shape whose scores read planes of their own, so that the target, a constant to
// the loss, stays put while queries and keys are nudged.
Case alignment_case() {
  Case c = case_named("group_7");
  c.name = "alignment";
  c.head_dim = 6;
  c.heads_q = 4;
  c.steps = {{{30, 75}, {0, 0}, {60, 63}}};
  c.config = {.kernel_size = 4,
              .kernel_stride = 2,
              .block_size = 8,
              .window_size = 8,
              .topk = 2,
              .use_nope = true,
              .dense_len = -1};
  return c;
}

struct AlignmentOnReference {
  explicit AlignmentOnReference(const Case& c)
      : rig(open("reference"), c, DType::kF64, DType::kF64) {
    rig.enter(c.steps[0]);
    for (std::int32_t s = 0; s < c.sequences(); ++s) {
      for (std::int64_t t = c.steps[0][s].first; t < c.steps[0][s].end; ++t) {
        append_queries(c, s, t, Queries::kAttend, DType::kF64, q);
        append_queries(c, s, t, Queries::kScore, DType::kF64, q_score);
      }
    }
    const auto rows = static_cast<std::size_t>(rig.tokens());
    const auto blocks = static_cast<std::size_t>(rig.blocks());
    loss.resize(rows * c.heads_kv);
    norms.resize(rows * c.heads_q);
    grad_scores.resize(rows * c.heads_kv * blocks);
    windows.resize(grad_scores.size());
  }
  AlignParams params() {
    return {.pages = rig.pages(),
            .batch = rig.batch(),
            .config = rig.config(),
            .heads_q = rig.test_case().heads_q,
            .scale = rig.scale(),
            .q = q.data(),
            .q_score = q_score.data(),
            .num_rows = rig.tokens(),
            .loss = loss.data(),
            .norms = norms.data(),
            .grad_scores = grad_scores.data(),
            .windows = windows.data()};
  }
  void run() { must(align(rig.backend(), params(), workspace)); }

  Rig rig;
  std::vector<double> q, q_score, loss, norms, grad_scores;
  std::vector<std::int32_t> windows;
  std::vector<std::byte> workspace = std::vector<std::byte>(1 << 20);
};

// Transcribed from the loss that the example's model was trained with (examples/needle).
TEST(Reference, AlignmentIsCrossEntropyOfBlockMasses) {
  const Case c = alignment_case();
  AlignmentOnReference made(c);
  made.run();
  const std::int64_t dim = c.head_dim;
  const auto inner = [&](const double* a, const double* b) {
    return std::inner_product(a, a + dim, b, 0.0);
  };
  const auto log_sum = [](const std::vector<double>& x) {
    double sum = 0;
    for (const double value : x) sum += std::exp(value);
    return std::log(sum);
  };
  std::int64_t with_loss = 0;
  for (std::int32_t r = 0; r < made.rig.tokens(); ++r) {
    const int s = r < 45 ? 0 : 2;
    const std::int64_t p = made.rig.position(r);
    const SequenceNumbers& numbers = made.rig.numbers()[s];
    for (std::int64_t g = 0; g < c.heads_kv; ++g) {
      const auto key = [&](const std::vector<double>& plane, std::int64_t t) {
        return plane.data() + (t * c.heads_kv + g) * dim;
      };
      const auto pooled = [&](std::int64_t first, std::int64_t count) {
        std::vector<double> mean(static_cast<std::size_t>(dim), 0.0);
        for (std::int64_t t = first; t < first + count; ++t) {
          for (std::int64_t d = 0; d < dim; ++d) {
            mean[d] += key(numbers.k_score, t)[d] / static_cast<double>(count);
          }
        }
        return mean;
      };
      // Free are blocks 1 .. p / 8 - 2: neither sink, nor own, nor the one before.
      const std::int64_t end = p / 8 - 1;
      double total = 0;
      std::vector<double> mass(static_cast<std::size_t>(p / 8 + 1), 0.0);
      std::vector<std::vector<double>> terms;
      for (std::int64_t h = 2 * g; h < 2 * g + 2; ++h) {
        const double* q = made.q.data() + (r * c.heads_q + h) * dim;
        const double* q_score = made.q_score.data() + (r * c.heads_q + h) * dim;
        std::vector<double> x, a;
        for (std::int64_t t = 0; t <= p; ++t)
          x.push_back(made.rig.scale() * inner(q, key(numbers.k, t)));
        for (std::int64_t t = 0; t <= p; ++t) mass[t / 8] += std::exp(x[t] - log_sum(x)) / 2;
        for (std::int64_t m = 0; 8 * m + 16 <= p + 1; ++m) {
          a.push_back(made.rig.scale() * inner(q_score, pooled(8 * m, 16).data()));
        }
        terms.emplace_back();
        for (std::int64_t j = 0; 2 * j + 4 <= p + 1; ++j) {
          terms.back().push_back(made.rig.scale() * inner(q_score, pooled(2 * j, 4).data()) -
                                 (a.empty() ? 0 : log_sum(a)));
        }
      }
      std::vector<double> best;
      for (std::int64_t b = 1; b < end; ++b) {
        double top = -INFINITY;  // windows 4 b - 1 .. 4 b + 3 overlap the block
        for (std::int64_t j = 4 * b - 1; j <= 4 * b + 3; ++j) {
          top = std::max(top, log_sum({terms[0][j], terms[1][j]}));
        }
        best.push_back(top);
      }
      for (std::int64_t b = 1; b < end; ++b) total -= mass[b] * (best[b - 1] - log_sum(best));
      EXPECT_NEAR(made.loss[g * made.rig.tokens() + r], total, 1e4 * 0x1p-53) << r;
      with_loss += total > 0 ? 1 : 0;
    }
  }
  EXPECT_GT(with_loss, made.rig.tokens());
}

TEST(Reference, AlignmentGradientsAreFiniteDifferences) {
  const Case c = alignment_case();
  AlignmentOnReference made(c);
  Random random(3);
  const std::vector<double> grad_loss =
      random.normals(std::int64_t{made.rig.tokens()} * c.heads_kv, DType::kF64);
  const auto loss = [&] {
    made.run();
    return std::inner_product(made.loss.begin(), made.loss.end(), grad_loss.begin(), 0.0);
  };
  loss();
  std::vector<double> grad_q(made.q.size(), NAN);
  std::vector<double> grad_k(static_cast<std::size_t>((75 + 63) * c.heads_kv * c.head_dim), NAN);
  must(align_backward(made.rig.backend(),
                      {.forward = made.params(),
                       .grad_loss = grad_loss.data(),
                       .grad_q = grad_q.data(),
                       .grad_k = grad_k.data()},
                      made.workspace));
  // The error of a central difference is h^2 / 6 third derivatives plus rounding / h.
  const double h = 1e-5;
  const double allowed = 1e3 * h * h + 1e2 * 0x1p-53 / h;
  for (std::size_t i = 0; i < grad_q.size(); i += 5) {
    made.q_score[i] += h;
    const double up = loss();
    made.q_score[i] -= 2 * h;
    const double down = loss();
    made.q_score[i] += h;
    ASSERT_NEAR(grad_q[i], (up - down) / (2 * h), allowed) << "q " << i;
  }
  const std::int64_t width = std::int64_t{c.heads_kv} * c.head_dim;
  const auto loss_with = [&](std::int32_t s, std::int64_t at, double by) {
    made.rig.numbers()[s].k_score[at] += by;
    Step again = c.steps[0];
    for (Span& span : again) span.first = 0;  // append everything again
    made.rig.enter(again);
    made.rig.enter(c.steps[0]);
    return loss();
  };
  for (const std::int32_t s : {0, 2}) {
    const std::int64_t offset = s == 0 ? 0 : 75 * width;
    for (std::int64_t at = 0; at < c.steps[0][s].end * width; at += 7) {
      const double up = loss_with(s, at, h);
      const double down = loss_with(s, at, -2 * h);
      loss_with(s, at, h);
      ASSERT_NEAR(grad_k[offset + at], (up - down) / (2 * h), allowed) << "k " << at;
    }
  }
}

}  // namespace
}  // namespace infllm::testing
