// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/align.h"

#include <fmt/format.h>
#include <gmock/gmock.h>

#include <cmath>
#include <numeric>

#include "infllm/backend/reference/align_row.h"
#include "infllm/backend/reference/rounding.h"
#include "tests/support/grid.h"
#include "tests/support/refusal.h"

namespace infllm::testing {
namespace {

// Without a list, all tokens.
struct Rows {
  std::vector<std::int32_t> list;
  bool all = true;
};

// Every third token, and numbers that are none.
Rows some_rows(const Rig& rig) {
  Rows rows{.list = {-1}, .all = false};
  for (std::int32_t t = 0; t < rig.tokens(); t += 3) rows.list.push_back(t);
  rows.list.push_back(rig.tokens());
  return rows;
}

struct Aligned {
  std::vector<double> loss;           // [Hkv, R]
  std::vector<double> norms;          // [Hq, R]
  std::vector<double> grad_scores;    // [Hkv, R, N]
  std::vector<std::int32_t> windows;  // [Hkv, R, N]
};

struct Gradients {
  std::vector<double> q;  // [R, Hq, D]
  std::vector<double> k;  // [keys, Hkv, D]
};

// One step of a rig with the rows that are looked at.
class Alignment {
 public:
  Alignment(const Rig& rig, const Step& step, const Rows& rows)
      : rig_(rig),
        backend_(rig.backend()),
        case_(rig.test_case()),
        dtype_(backend_.kernels->activation),
        sums_(backend_.kernels->accumulate),
        count_(rows.all ? rig.tokens() : static_cast<std::int32_t>(rows.list.size())),
        q_(rig.query_rows(Queries::kAttend)),
        list_(upload(backend_, rows.list)) {
    if (case_.config.use_nope) q_score_ = rig.query_rows(Queries::kScore);
    for (const Span& span : step) keys_ += span.end;
    params_ = {.pages = rig.pages(),
               .batch = rig.batch(),
               .config = rig.config(),
               .heads_q = case_.heads_q,
               .scale = rig.scale(),
               .q = q_.data(),
               .q_score = q_score_.data(),
               .rows = rows.all ? nullptr : list_.as<std::int32_t>(),
               .num_rows = count_};
  }

  std::int64_t rows() const { return count_; }
  std::int64_t keys() const { return keys_; }
  std::int64_t block_rows() const { return case_.heads_kv * rows() * rig_.blocks(); }

  Aligned run() {
    const Buffer loss = poisoned(backend_, case_.heads_kv * rows(), sums_);
    const Buffer norms = poisoned(backend_, case_.heads_q * rows(), sums_);
    const Buffer scores = poisoned(backend_, block_rows(), sums_);
    const Buffer windows = poisoned(backend_, block_rows(), DType::kF32);
    AlignParams p = params_;
    p.loss = loss.data();
    p.norms = norms.data();
    p.grad_scores = scores.data();
    p.windows = windows.as<std::int32_t>();
    with_workspace(align_workspace_bytes(backend_, p),
                   [&](auto workspace) { return align(backend_, p, workspace); });
    Aligned out{download(backend_, loss, case_.heads_kv * rows(), sums_),
                download(backend_, norms, case_.heads_q * rows(), sums_),
                download(backend_, scores, block_rows(), sums_),
                std::vector<std::int32_t>(static_cast<std::size_t>(block_rows()))};
    must(copy_out(backend_, out.windows.data(), windows.data(),
                  out.windows.size() * sizeof(std::int32_t)));
    return out;
  }

  Gradients back(const Aligned& forward, const std::vector<double>& grad_loss) {
    const std::int64_t query_count = rows() * case_.heads_q * case_.head_dim;
    const std::int64_t key_count = keys_ * case_.heads_kv * case_.head_dim;
    const Buffer norms = upload(backend_, forward.norms, sums_);
    const Buffer scores = upload(backend_, forward.grad_scores, sums_);
    const Buffer windows = upload(backend_, forward.windows);
    const Buffer grads = upload(backend_, grad_loss, sums_);
    const Buffer grad_q = poisoned(backend_, query_count, dtype_);
    const Buffer grad_k = poisoned(backend_, key_count, dtype_);
    AlignBackwardParams p{.forward = params_,
                          .grad_loss = grads.data(),
                          .grad_q = grad_q.data(),
                          .grad_k = grad_k.data()};
    p.forward.norms = norms.data();
    p.forward.grad_scores = scores.data();
    p.forward.windows = windows.as<std::int32_t>();
    with_workspace(align_backward_workspace_bytes(backend_, p),
                   [&](auto workspace) { return align_backward(backend_, p, workspace); });
    return {download(backend_, grad_q, query_count, dtype_),
            download(backend_, grad_k, key_count, dtype_)};
  }

  const AlignParams& params() const { return params_; }

 private:
  template <typename Operation>
  void with_workspace(std::size_t bytes, Operation&& operation) const {
    const Buffer workspace =
        poisoned(backend_, static_cast<std::int64_t>(bytes / 4 + 1), DType::kF32);
    must(operation(std::span<std::byte>(workspace.data(), bytes)));
  }

  const Rig& rig_;
  const Backend& backend_;
  const Case& case_;
  DType dtype_;
  DType sums_;
  std::int32_t count_;
  Buffer q_, q_score_, list_;
  AlignParams params_;
  std::int64_t keys_ = 0;
};

// s[j] of a row on a reference's pages, its sums taken in Real.
template <typename Real>
Real score_of(const Alignment& alignment, const Aligned& out, std::int64_t r, std::int32_t group,
              std::int64_t j) {
  const AlignParams& p = alignment.params();
  const std::int64_t dim = p.pages.layout.head_dim;
  const std::int32_t heads = p.heads_q / p.pages.layout.kv_heads;
  const reference::AlignRow row(p, r);
  const reference::Pages pages(p.pages, p.batch);
  const double* key = pages.fine(row.place.sequence, group, j);
  const auto* q = static_cast<const double*>(p.config.use_nope ? p.q_score : p.q);
  std::vector<Real> query(static_cast<std::size_t>(dim));
  return reference::log_sum_exp<Real>(heads, [&](std::int64_t h) {
    const std::int64_t head = group * heads + h;
    std::copy_n(q + (row.token * p.heads_q + head) * dim, dim, query.begin());
    return static_cast<Real>(p.scale) * reference::dot<Real>(query.data(), key, dim) -
           static_cast<Real>(out.norms[static_cast<std::size_t>(head * p.num_rows + r)]);
  });
}

// Judged by value: a window that was taken for the best is as good as the best one, give or take
// twice the error of sums in float for both, and an ulp.
void expect_best_windows(const Alignment& exact, const Aligned& want, const Aligned& rounded,
                         const Aligned& got, const Label& label) {
  const AlignParams& p = exact.params();
  const std::int64_t blocks = p.config.blocks_in(p.batch.max_kv_length);
  double error = 0;
  double worst = 0;
  std::string where;
  for (std::int64_t at = 0; at < exact.block_rows(); ++at) {
    const std::int64_t r = at / blocks % exact.rows();
    const auto group = static_cast<std::int32_t>(at / blocks / exact.rows());
    const std::int64_t block = at % blocks;
    const std::int64_t best = want.windows[at];
    const std::int64_t taken = got.windows[at];
    const std::int64_t first = std::max<std::int64_t>(0, p.config.first_window_of(block));
    const std::int64_t end = p.config.first_window_of(block) + p.config.windows_per_block();
    if (best < 0 ? taken != -1 : taken < first || taken >= end) {
      ADD_FAILURE() << describe(label) << ": row " << r << " head " << group << " block " << block
                    << " has window " << taken << ", expected "
                    << (best < 0 ? "-1" : "one of the block's");
      return;
    }
    if (best < 0) continue;
    const double value = score_of<double>(exact, want, r, group, best);
    error = std::max(error, std::fabs(score_of<float>(exact, rounded, r, group, best) - value) +
                                ulp(value, DType::kF32));
    if (taken == best) continue;
    const double lost = value - score_of<double>(exact, want, r, group, taken);
    if (lost > worst) {
      worst = lost;
      where = fmt::format("row {} head {} block {}", r, group, block);
    }
  }
  EXPECT_LE(worst, 4 * error) << describe(label) << ": " << where;
}

std::vector<double> stored(std::vector<double> values, DType dtype) {
  for (double& value : values) value = reference::round_to(dtype, value);
  return values;
}

struct Ledgers {
  Ledgers(const Point& point, const Kernels& kernels)
      : label(label_of(point, "align")),
        accumulate(kernels.accumulate),
        loss(label_of(point, "align loss"), Error::kAbsolute, kernels.accumulate),
        norms(label_of(point, "align norms"), Error::kAbsolute, kernels.accumulate),
        scores(label_of(point, "align dR"), Error::kAbsolute, kernels.accumulate),
        q(label_of(point, "align dQ"), Error::kAbsolute, kernels.activation),
        k(label_of(point, "align dK"), Error::kAbsolute, kernels.activation) {}

  // The way back starts for everybody from the exact results of the way there, as they are stored.
  void add(std::size_t number, Trio& trio, const Step& step, const Rows& rows) {
    const Case& c = trio.kernel.test_case();
    Alignment kernel(trio.kernel, step, rows);
    Alignment exact(trio.exact, step, rows);
    Alignment rounded(trio.rounded, step, rows);
    const Aligned got = kernel.run();
    const Aligned want = exact.run();
    const Aligned near = rounded.run();
    const std::int64_t count = kernel.rows();
    loss.add(number, {c.heads_kv, count}, got.loss, want.loss, near.loss);
    norms.add(number, {c.heads_q, count}, got.norms, want.norms, near.norms);
    scores.add(number, {c.heads_kv, count, trio.kernel.blocks()}, got.grad_scores, want.grad_scores,
               near.grad_scores);
    expect_best_windows(exact, want, near, got, label);

    Random random(number + 1);
    const std::vector<double> grad_loss = random.normals(c.heads_kv * count, DType::kF32);
    const Aligned seen = {want.loss, stored(want.norms, accumulate),
                          stored(want.grad_scores, accumulate), want.windows};
    const Gradients back = kernel.back(seen, grad_loss);
    const Gradients truth = exact.back(want, grad_loss);
    const Gradients near_truth = rounded.back(seen, grad_loss);
    q.add(number, {count, c.heads_q, c.head_dim}, back.q, truth.q, near_truth.q);
    k.add(number, {kernel.keys(), c.heads_kv, c.head_dim}, back.k, truth.k, near_truth.k);
  }

  void expect_balanced() const {
    for (const Ledger* ledger : {&loss, &norms, &scores, &q, &k}) EXPECT_TRUE(ledger->balanced());
  }

  Label label;
  DType accumulate;
  Ledger loss, norms, scores, q, k;
};

class AlignTest : public ::testing::TestWithParam<Point> {};

TEST_P(AlignTest, StaysWithinTheBudget) {
  SKIP_WITHOUT(GetParam(), align);
  Trio trio(GetParam());
  Ledgers ledgers(GetParam(), *trio.kernel.backend().kernels);
  for (std::size_t i = 0; i < trio.steps().size(); ++i) {
    trio.enter(trio.steps()[i]);
    ledgers.add(2 * i, trio, trio.steps()[i], {});
    ledgers.add(2 * i + 1, trio, trio.steps()[i], some_rows(trio.kernel));
  }
  ledgers.expect_balanced();
}

INSTANTIATE_TEST_SUITE_P(Grid, AlignTest, ::testing::ValuesIn(grid()), point_name);

class AlignEdge : public ::testing::TestWithParam<std::string> {};

TEST_P(AlignEdge, RepeatsBitByBitWithAnyNumberOfThreads) {
  for (const DType kv : cache_types(GetParam())) {
    for (const char* name : {"group_16", "group_7", "many_blocks"}) {
      const Point point{GetParam(), kv, name};
      SKIP_WITHOUT(point, align);
      const auto once = [&](int threads) {
        Rig rig(open(GetParam(), threads), case_named(name), kv);
        const Step& step = rig.test_case().steps[0];
        rig.enter(step);
        Alignment alignment(rig, step, some_rows(rig));
        const Aligned forward = alignment.run();
        const Gradients back =
            alignment.back(forward, std::vector<double>(forward.loss.size(), 1.0));
        return std::pair(forward, back);
      };
      const auto [forward, back] = once(1);
      for (const int threads : {1, 3}) {
        const auto [forward_again, back_again] = once(threads);
        EXPECT_EQ(forward.loss, forward_again.loss) << name;
        EXPECT_EQ(forward.grad_scores, forward_again.grad_scores) << name;
        EXPECT_EQ(forward.windows, forward_again.windows) << name;
        EXPECT_EQ(back.q, back_again.q) << name;
        EXPECT_EQ(back.k, back_again.k) << name;
      }
    }
  }
}

// What a row gets does not depend on the rows beside it.
TEST_P(AlignEdge, RowsDoNotKnowOfEachOther) {
  const Point point{GetParam(), cache_types(GetParam()).back(), "group_2_dim_128"};
  SKIP_WITHOUT(point, align);
  Rig rig(open(GetParam()), case_named(point.case_name), point.kv);
  const Step& step = rig.test_case().steps[0];
  rig.enter(step);
  const Rows some = some_rows(rig);
  Alignment every(rig, step, {});
  Alignment few(rig, step, some);
  const Aligned a = every.run();
  const Aligned b = few.run();
  for (std::int64_t g = 0; g < rig.test_case().heads_kv; ++g) {
    for (std::int64_t r = 0; r < few.rows(); ++r) {
      const std::int32_t token = some.list[r];
      const bool is_row = token >= 0 && token < rig.tokens();
      EXPECT_EQ(b.loss[g * few.rows() + r], is_row ? a.loss[g * every.rows() + token] : 0) << r;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, AlignEdge, ::testing::ValuesIn(kernel_backends()), backend_id);

TEST(AlignRefusal, NamesWhatIsWrong) {
  using ::testing::HasSubstr;
  Rig rig(open("reference"), case_named("use_nope"), DType::kF32);
  rig.enter(rig.test_case().steps[0]);
  AlignParams params{.pages = rig.pages(),
                     .batch = rig.batch(),
                     .config = rig.config(),
                     .heads_q = 4,
                     .scale = 1,
                     .num_rows = 7};
  const auto refusal = [&] { return message_of(align(rig.backend(), params, {})); };
  EXPECT_THAT(refusal(), HasSubstr("align: 7 rows without a list of them, expected num_rows = "));
  const std::int32_t rows[] = {0, 1, 2, 3, 4, 5, 6};
  params.rows = rows;
  EXPECT_EQ(refusal(), "align: q is null, expected an array");
  params.q = &rig;
  EXPECT_EQ(refusal(), "align: q_score (use_nope) is null, expected an array");
  params.q_score = &rig;
  EXPECT_EQ(refusal(), "align: norms is null, expected an array");
  params.norms = &rig;
  EXPECT_EQ(refusal(), "align: grad_scores is null, expected an array");
  params.grad_scores = &rig;
  EXPECT_EQ(refusal(), "align: windows is null, expected an array");
  std::int32_t window = 0;
  params.windows = &window;
  EXPECT_EQ(refusal(), "align: loss is null, expected an array");
  AlignBackwardParams backward{.forward = params};
  EXPECT_EQ(message_of(align_backward(rig.backend(), backward, {})),
            "align_backward: grad_loss is null, expected an array");
  params.pages.layout.pooled_keys = false;
  EXPECT_THAT(refusal(), HasSubstr("align: the cache has no pooled keys"));
  params.heads_q = 3;
  EXPECT_THAT(refusal(), HasSubstr("align: 3 query heads and 2 KV heads"));
}

}  // namespace
}  // namespace infllm::testing
