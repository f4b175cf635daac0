// SPDX-License-Identifier: Apache-2.0
//
// The reference's gradients and its selection-alignment loss prove themselves: against finite
// differences, and against a transcription of the loss that shares no code with it.
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "infllm/ops/align.h"
#include "tests/support/grid.h"

namespace infllm::testing {
namespace {

// d(sum dO O + sum dLSE LSE) for every q, k and v, against central differences.
TEST(ReferenceGradients, OfAttendAreFiniteDifferences) {
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
TEST(ReferenceGradients, AlignmentIsCrossEntropyOfBlockMasses) {
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

TEST(ReferenceGradients, OfAlignmentAreFiniteDifferences) {
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
