// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>

#include <cmath>

#include "infllm/backend/reference/rounding.h"
#include "infllm/ops/attend.h"
#include "tests/support/grid.h"

namespace infllm::testing {
namespace {

struct Gradients {
  std::vector<double> q;     // [T, Hq, D]
  std::vector<double> k, v;  // [keys, Hkv, D]
};

// What flows back into O and LSE; without lse, nothing flows into that.
struct Incoming {
  std::vector<double> o, lse;
};

Incoming incoming(const Rig& rig, std::uint64_t seed) {
  const Case& c = rig.test_case();
  const std::int64_t rows = std::int64_t{rig.tokens()} * c.heads_q;
  Random random(seed);
  const DType dtype = numbers_type(rig.backend());
  return {random.normals(rows * c.head_dim, dtype), random.normals(rows, DType::kF32)};
}

std::int64_t keys_of(const Step& step) {
  std::int64_t keys = 0;
  for (const Span& span : step) keys += span.end;
  return keys;
}

// Selected blocks, [Hkv, T, columns]; without columns, attention is dense.
struct Selection {
  std::vector<std::int32_t> blocks;
  std::int32_t columns = 0;
};

AttendParams forward_params(const Rig& rig, const Buffer& q, const Buffer& o, const Buffer& lse,
                            const Buffer& chosen, const Selection& selection) {
  return {.pages = rig.pages(),
          .batch = rig.batch(),
          .heads_q = rig.test_case().heads_q,
          .scale = rig.scale(),
          .q = q.data(),
          .o = o.data(),
          .lse = lse.data(),
          .selection = selection.columns == 0 ? nullptr : chosen.as<std::int32_t>(),
          .columns = selection.columns};
}

template <typename Operation>
void with_workspace(const Backend& backend, std::size_t bytes, Operation&& operation) {
  const Buffer workspace = poisoned(backend, static_cast<std::int64_t>(bytes / 4 + 1), DType::kF32);
  must(operation(std::span<std::byte>(workspace.data(), bytes)));
}

Attended forward(const Rig& rig, const Selection& selection) {
  const Backend& backend = rig.backend();
  const DType dtype = backend.kernels->activation;
  const DType sums = backend.kernels->accumulate;
  const std::int64_t rows = std::int64_t{rig.tokens()} * rig.test_case().heads_q;
  const std::int64_t count = rows * rig.test_case().head_dim;
  const Buffer q = rig.query_rows(Queries::kAttend);
  const Buffer o = poisoned(backend, count, dtype);
  const Buffer lse = poisoned(backend, rows, sums);
  const Buffer chosen = upload(backend, selection.blocks);
  const AttendParams params = forward_params(rig, q, o, lse, chosen, selection);
  with_workspace(backend, attend_workspace_bytes(backend, params),
                 [&](auto workspace) { return attend(backend, params, workspace); });
  return {download(backend, o, count, dtype), download(backend, lse, rows, sums)};
}

Gradients backward(const Rig& rig, const Step& step, const Selection& selection,
                   const Attended& out, const Incoming& in) {
  const Backend& backend = rig.backend();
  const Case& c = rig.test_case();
  const DType dtype = backend.kernels->activation;
  const DType sums = backend.kernels->accumulate;
  const std::int64_t query_count = std::int64_t{rig.tokens()} * c.heads_q * c.head_dim;
  const std::int64_t key_count = keys_of(step) * c.heads_kv * c.head_dim;
  const Buffer q = rig.query_rows(Queries::kAttend);
  const Buffer o = upload(backend, out.o, dtype);
  const Buffer lse = upload(backend, out.lse, sums);
  const Buffer chosen = upload(backend, selection.blocks);
  const Buffer grad_o = upload(backend, in.o, dtype);
  const Buffer grad_lse = upload(backend, in.lse, sums);
  const Buffer grad_q = poisoned(backend, query_count, dtype);
  const Buffer grad_k = poisoned(backend, key_count, dtype);
  const Buffer grad_v = poisoned(backend, key_count, dtype);
  const AttendBackwardParams params{.forward = forward_params(rig, q, o, lse, chosen, selection),
                                    .grad_o = grad_o.data(),
                                    .grad_lse = in.lse.empty() ? nullptr : grad_lse.data(),
                                    .grad_q = grad_q.data(),
                                    .grad_k = grad_k.data(),
                                    .grad_v = grad_v.data()};
  with_workspace(backend, attend_backward_workspace_bytes(backend, params),
                 [&](auto workspace) { return attend_backward(backend, params, workspace); });
  return {download(backend, grad_q, query_count, dtype),
          download(backend, grad_k, key_count, dtype), download(backend, grad_v, key_count, dtype)};
}

std::vector<double> stored(std::vector<double> values, DType dtype) {
  for (double& value : values) value = reference::round_to(dtype, value);
  return values;
}

struct Ledgers {
  Ledgers(const Point& point, const Rig& kernel, const std::string& op)
      : q(label_of(point, op + " dQ"), Error::kAbsolute, kernel.backend().kernels->activation),
        k(label_of(point, op + " dK"), Error::kAbsolute, kernel.backend().kernels->activation),
        v(label_of(point, op + " dV"), Error::kAbsolute, kernel.backend().kernels->activation) {}

  // The kernel on `selection`, both references on `meaning`, which says the same. The kernel and
  // the rounded reference start from the exact O and LSE as they are stored: errors of the forward
  // pass are not theirs.
  void add(std::size_t number, Trio& trio, const Step& step, const Selection& selection,
           const Selection& meaning, const Incoming& in) {
    const Kernels& kernels = *trio.kernel.backend().kernels;
    const Attended out = forward(trio.exact, meaning);
    const Attended seen = {stored(out.o, kernels.activation), stored(out.lse, kernels.accumulate)};
    const Gradients got = backward(trio.kernel, step, selection, seen, in);
    const Gradients exact = backward(trio.exact, step, meaning, out, in);
    const Gradients rounded = backward(trio.rounded, step, meaning, seen, in);
    const Case& c = trio.kernel.test_case();
    const std::vector<std::int64_t> keys = {keys_of(step), c.heads_kv, c.head_dim};
    q.add(number, {trio.kernel.tokens(), c.heads_q, c.head_dim}, got.q, exact.q, rounded.q);
    k.add(number, keys, got.k, exact.k, rounded.k);
    v.add(number, keys, got.v, exact.v, rounded.v);
  }
  void expect_balanced() const {
    EXPECT_TRUE(q.balanced());
    EXPECT_TRUE(k.balanced());
    EXPECT_TRUE(v.balanced());
  }

  Ledger q, k, v;
};

class AttendBackwardTest : public ::testing::TestWithParam<Point> {};

// Everybody attends to the blocks that the exact reference chose.
TEST_P(AttendBackwardTest, StaysWithinTheBudget) {
  SKIP_WITHOUT(GetParam(), attend_backward);
  Trio trio(GetParam());
  Ledgers ledgers(GetParam(), trio.kernel, "attend_backward");
  for (std::size_t i = 0; i < trio.steps().size(); ++i) {
    const Step& step = trio.steps()[i];
    trio.enter(step);
    Selection selection;
    if (trio.exact.batch().any_sparse) {
      selection = {trio.exact.select(trio.exact.score()), trio.kernel.columns()};
    }
    Incoming in = incoming(trio.kernel, i + 1);
    if (i % 2 == 1) in.lse.clear();
    ledgers.add(i, trio, step, selection, selection, in);
  }
  ledgers.expect_balanced();
}

INSTANTIATE_TEST_SUITE_P(Grid, AttendBackwardTest, ::testing::ValuesIn(grid()), point_name);

// Blocks up to each token's own, each with probability 1 / `one_in`, in as many columns.
Selection random_blocks(const Rig& rig, std::int32_t columns, int one_in) {
  Random random(11);
  std::vector<std::int32_t> chosen;
  for (std::int32_t g = 0; g < rig.test_case().heads_kv; ++g) {
    for (std::int32_t t = 0; t < rig.tokens(); ++t) {
      const std::int64_t own = rig.position(t) / rig.config().block_size;
      std::vector<std::int32_t> row;
      for (std::int32_t b = 0; b <= own; ++b) {
        if (static_cast<std::int32_t>(row.size()) < columns && random.below(one_in) == 0) {
          row.push_back(b);
        }
      }
      row.resize(static_cast<std::size_t>(columns), -1);
      chosen.insert(chosen.end(), row.begin(), row.end());
    }
  }
  return {chosen, columns};
}

class AttendBackwardEdge : public ::testing::TestWithParam<std::string> {};

// Blocks that nobody chose, tokens that chose none, tokens that did not choose their own.
TEST_P(AttendBackwardEdge, TakesAnySelection) {
  for (const DType kv : cache_types(GetParam())) {
    for (const char* name : {"group_7", "group_1", "group_2_dim_128"}) {
      const Point point{GetParam(), kv, name};
      SKIP_WITHOUT(point, attend_backward);
      Trio trio(point);
      const Step& step = trio.steps()[0];
      trio.enter(step);
      const Selection selection = random_blocks(trio.kernel, trio.kernel.columns(), 4);
      Ledgers ledgers(point, trio.kernel, "attend_backward (random blocks)");
      ledgers.add(0, trio, step, selection, selection, incoming(trio.kernel, 3));
      ledgers.expect_balanced();
    }
  }
}

TEST_P(AttendBackwardEdge, AllBlocksSelectedIsDense) {
  for (const DType kv : cache_types(GetParam())) {
    const Point point{GetParam(), kv, "group_2_dim_128"};
    SKIP_WITHOUT(point, attend_backward);
    Trio trio(point);
    const Step& step = trio.steps()[0];
    trio.enter(step);
    const auto columns = static_cast<std::int32_t>(trio.kernel.blocks());
    const Selection all = random_blocks(trio.kernel, columns, 1);
    Ledgers ledgers(point, trio.kernel, "attend_backward (all blocks against dense)");
    ledgers.add(0, trio, step, all, {}, incoming(trio.kernel, 4));
    ledgers.expect_balanced();
  }
}

TEST_P(AttendBackwardEdge, RepeatsBitByBitWithAnyNumberOfThreads) {
  for (const DType kv : cache_types(GetParam())) {
    for (const char* name : {"group_16", "dense_only", "many_blocks"}) {
      const Point point{GetParam(), kv, name};
      SKIP_WITHOUT(point, attend_backward);
      const auto gradients = [&](int threads) {
        Rig rig(open(GetParam(), threads), case_named(name), kv);
        const Step& step = rig.test_case().steps[0];
        rig.enter(step);
        Selection selection;
        if (rig.batch().any_sparse) selection = random_blocks(rig, rig.columns(), 2);
        return backward(rig, step, selection, forward(rig, selection), incoming(rig, 5));
      };
      const Gradients once = gradients(1);
      for (const int threads : {1, 3}) {
        const Gradients again = gradients(threads);
        EXPECT_EQ(once.q, again.q) << point.case_name;
        EXPECT_EQ(once.k, again.k) << point.case_name;
        EXPECT_EQ(once.v, again.v) << point.case_name;
      }
    }
  }
}

// Keys of a sequence that has no tokens in the step.
TEST_P(AttendBackwardEdge, KeysThatNobodySeesHaveNoGradient) {
  const Point point{GetParam(), cache_types(GetParam()).back(), "taking_turns"};
  SKIP_WITHOUT(point, attend_backward);
  Rig rig(open(GetParam()), case_named(point.case_name), point.kv);
  const Step& step = rig.test_case().steps[0];  // 450 keys, and 10 without a token
  rig.enter(step);
  const auto count =
      static_cast<std::size_t>(rig.test_case().heads_kv) * rig.tokens() * rig.columns();
  const Selection none = {std::vector<std::int32_t>(count, -1), rig.columns()};
  const Gradients out = backward(rig, step, none, forward(rig, none), incoming(rig, 6));
  EXPECT_THAT(out.q, ::testing::Each(0.0));
  EXPECT_THAT(out.k, ::testing::Each(0.0));
  EXPECT_THAT(out.v, ::testing::Each(0.0));
}

INSTANTIATE_TEST_SUITE_P(Backends, AttendBackwardEdge, ::testing::ValuesIn(kernel_backends()),
                         backend_id);

}  // namespace
}  // namespace infllm::testing
