// SPDX-License-Identifier: Apache-2.0
//
// The way from one attention to the next as one step gives what its parts give, within the budget.
#include "infllm/ops/interlude.h"

#include <fmt/format.h>
#include <gmock/gmock.h>

#include <cmath>

#include "tests/support/grid.h"
#include "tests/support/plumbing.h"
#include "tests/support/refusal.h"

namespace infllm::testing {
namespace {

using ::testing::HasSubstr;

class InterludeTest : public PlumbingTest {};

struct Widths {
  std::int64_t attended, hidden, wide, outputs;  // outputs 0: nothing follows
};

// The numbers of one interlude on a backend.
struct Numbers {
  Numbers(const Bench& bench, const Widths& w) : widths(w) {
    Random random(static_cast<std::uint64_t>(w.attended + w.hidden));
    const auto matrix = [&](std::int64_t outputs, std::int64_t inputs) {
      const std::vector<double> values =
          random.normals(outputs * inputs, DType::kF32, 1 / std::sqrt(static_cast<double>(inputs)));
      const std::vector<float> narrow(values.begin(), values.end());
      const TensorView part = TensorView::matrix(narrow.data(), DType::kF32, outputs, inputs);
      return must(pack_linear(bench.backend, {&part, 1}, WeightFormat::kF32));
    };
    const auto norm = [&] {
      const std::vector<double> values = random.normals(w.hidden, DType::kBF16);
      const std::vector<float> narrow(values.begin(), values.end());
      return must(
          upload_vector(bench.backend, TensorView::vector(narrow.data(), DType::kF32, w.hidden)));
    };
    o = matrix(w.hidden, w.attended);
    gate_up = matrix(2 * w.wide, w.hidden);
    down = matrix(w.hidden, w.wide);
    next = matrix(std::max<std::int64_t>(w.outputs, 1), w.hidden);
    mlp_norm = norm();
    next_norm = norm();
    attended = bench.in(random.normals(w.attended, DType::kF32));
    hidden = bench.in(random.normals(w.hidden, DType::kF32));
    const DType activation = bench.backend.kernels->activation;
    gated = poisoned(bench.backend, w.wide, activation);
    y = poisoned(bench.backend, std::max<std::int64_t>(w.outputs, 1), activation);
  }

  InterludeParams params() const {
    return {.tokens = 1,
            .o = &o,
            .gate_up = &gate_up,
            .down = &down,
            .next = widths.outputs > 0 ? &next : nullptr,
            .mlp_norm = mlp_norm.data(),
            .next_norm = next_norm.data(),
            .epsilon = 1e-5f,
            .residual_scale = 0.25f,
            .next_scale = 0.5f,
            .attended = attended.data(),
            .hidden = hidden.data(),
            .gated = gated.data(),
            .y = y.data()};
  }

  Widths widths;
  LinearWeight o, gate_up, down, next;
  Buffer mlp_norm, next_norm, attended, hidden, gated, y;
};

// The long way.
void one_by_one(const Bench& bench, const InterludeParams& p) {
  const DType activation = bench.backend.kernels->activation;
  const Buffer normed = poisoned(bench.backend, p.o->outputs, activation);
  const Buffer halves = poisoned(bench.backend, p.gate_up->outputs, activation);
  const auto multiply = [&](const LinearWeight& weight, const void* x, void* y, float alpha,
                            bool accumulate) {
    const LinearParams params{
        .weight = &weight, .tokens = 1, .x = x, .y = y, .alpha = alpha, .accumulate = accumulate};
    const Buffer workspace =
        must(allocate(bench.backend, linear_workspace_bytes(bench.backend, params)));
    must(linear(bench.backend, params, {workspace.data(), workspace.bytes()}));
  };
  const auto normalise = [&](const void* weight) {
    must(rms_norm(bench.backend, {.tokens = 1,
                                  .width = p.o->outputs,
                                  .x = p.hidden,
                                  .weight = weight,
                                  .epsilon = p.epsilon,
                                  .y = normed.data()}));
  };
  multiply(*p.o, p.attended, p.hidden, p.residual_scale, true);
  normalise(p.mlp_norm);
  multiply(*p.gate_up, normed.data(), halves.data(), 1, false);
  must(swiglu(bench.backend,
              {.tokens = 1, .width = p.down->inputs, .x = halves.data(), .y = p.gated}));
  multiply(*p.down, p.gated, p.hidden, p.residual_scale, true);
  if (p.next == nullptr) return;
  normalise(p.next_norm);
  multiply(*p.next, normed.data(), p.y, p.next_scale, false);
}

// Short rows, several of which share a slot of a device's ring; rows of one slot, of a slot and a
// bit, and of four; more and fewer rows than thread blocks; nothing behind it.
constexpr Widths kWidths[] = {
    {256, 512, 1024, 300}, {16384, 264, 136, 41}, {520, 4104, 72, 1030}, {4096, 1040, 9000, 0}};

TEST_P(InterludeTest, StaysWithinTheBudget) {
  if (open(GetParam(), 1).kernels->interlude.run == nullptr) GTEST_SKIP() << "takes the long way";
  const DType numbers = numbers_type(open(GetParam(), 1));
  for (const Widths& widths : kWidths) {
    expect_within_budget(
        fmt::format("interlude {} {} {} {}", widths.attended, widths.hidden, widths.wide,
                    widths.outputs),
        numbers, {widths.hidden + widths.outputs}, [&](const Bench& bench) {
          const Numbers n(bench, widths);
          if (has_interlude(bench.backend, n.params())) {
            must(interlude(bench.backend, n.params()));
          } else {
            EXPECT_EQ(bench.backend.kernels->interlude.run, nullptr) << "one token has this step";
            one_by_one(bench, n.params());
          }
          std::vector<double> left = bench.out(n.hidden, static_cast<std::size_t>(widths.hidden));
          const std::vector<double> y = bench.out(n.y, static_cast<std::size_t>(widths.outputs));
          left.insert(left.end(), y.begin(), y.end());
          return left;
        });
  }
}

// Blocks that count each other leave the counters as they found them.
TEST_P(InterludeTest, RepeatsBitByBit) {
  const Bench bench(open(GetParam(), 1));
  if (bench.backend.kernels->interlude.run == nullptr) GTEST_SKIP() << "takes the long way";
  std::vector<double> first;
  for (int i = 0; i < 20; ++i) {
    const Numbers n(bench, kWidths[0]);
    must(interlude(bench.backend, n.params()));
    const std::vector<double> y = bench.out(n.y, static_cast<std::size_t>(kWidths[0].outputs));
    if (i == 0) first = y;
    ASSERT_EQ(y, first) << "run " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, InterludeTest, ::testing::ValuesIn(kernel_backends()),
                         backend_id);

TEST(InterludeRefusal, NamesWhatIsWrong) {
  const Bench bench(open("reference"));
  const Numbers n(bench, {8, 16, 24, 4});
  const auto refused = [&](auto&& change) {
    InterludeParams p = n.params();
    change(p);
    return message_of(interlude(bench.backend, p));
  };
  EXPECT_THAT(refused([](InterludeParams&) {}), HasSubstr("has no such step"));
  EXPECT_THAT(refused([](InterludeParams& p) { p.o = nullptr; }), HasSubstr("o is null"));
  EXPECT_THAT(refused([](InterludeParams& p) { p.y = nullptr; }), HasSubstr("y is null"));
  EXPECT_THAT(refused([](InterludeParams& p) { p.epsilon = -1; }), HasSubstr("epsilon = -1"));
  EXPECT_THAT(refused([&](InterludeParams& p) { p.gate_up = p.down; }),
              HasSubstr("gate_up turns 24 numbers into 16, expected 16 into 48"));
}

}  // namespace
}  // namespace infllm::testing
