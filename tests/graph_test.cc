// SPDX-License-Identifier: Apache-2.0
//
// Recording a run of steps and starting it again, on devices that can; the refusal elsewhere.
#include <gmock/gmock.h>

#include "infllm/ops/transformer.h"
#include "tests/support/grid.h"
#include "tests/support/plumbing.h"
#include "tests/support/refusal.h"

namespace infllm::testing {
namespace {

using ::testing::HasSubstr;

class GraphTest : public ::testing::TestWithParam<std::string> {};

TEST_P(GraphTest, ReplayReadsTheArraysAnew) {
  const Bench bench(open(GetParam()));
  const Backend& backend = bench.backend;
  if (backend.kernels->record == nullptr) {
    const Status refused = record(backend, [] { return Status(); }).status();
    EXPECT_EQ(refused.code(), StatusCode::kUnsupported);
    EXPECT_THAT(refused.message(), HasSubstr(GetParam()));
    EXPECT_THAT(message_of(replay(backend, Graph())), HasSubstr("record() one"));
    return;
  }
  // norm, linear, swiglu: each reads what the one before wrote.
  const std::int64_t tokens = 3, width = 64, wide = 128;
  Random random(3);
  const std::vector<double> w = random.normals(2 * wide * width, bench.numbers);
  const std::vector<float> narrow(w.begin(), w.end());
  const TensorView matrix = TensorView::matrix(narrow.data(), DType::kF32, 2 * wide, width);
  const LinearWeight weight = must(pack_linear(backend, {&matrix, 1}, WeightFormat::kBF16));
  const Buffer norm = bench.floats(std::vector<float>(width, 1.5f));
  const DType type = backend.kernels->activation;
  const auto bytes = [&](std::int64_t count) {
    return static_cast<std::size_t>(count * size_of(type));
  };
  const Buffer x = must(allocate(backend, bytes(tokens * width)));
  const Buffer normed = poisoned(backend, tokens * width, type);
  const Buffer gate_up = poisoned(backend, tokens * 2 * wide, type);
  const Buffer y = must(allocate(backend, bytes(tokens * wide)));
  const LinearParams product{
      .weight = &weight, .tokens = tokens, .x = normed.data(), .y = gate_up.data()};
  const Buffer workspace = must(allocate(backend, linear_workspace_bytes(backend, product)));
  const auto steps = [&]() -> Status {
    INFLLM_TRY(rms_norm(backend, {.tokens = tokens,
                                  .width = width,
                                  .x = x.data(),
                                  .weight = norm.data(),
                                  .epsilon = 1e-5f,
                                  .y = normed.data()}));
    INFLLM_TRY(linear(backend, product, {workspace.data(), workspace.bytes()}));
    return swiglu(backend, {.tokens = tokens, .width = wide, .x = gate_up.data(), .y = y.data()});
  };
  const auto fill = [&](const Buffer& buffer, std::int64_t count, double scale) {
    const Buffer values = bench.in(random.normals(count, bench.numbers, scale));
    std::vector<std::byte> host(bytes(count));
    must(copy_out(backend, host.data(), values.data(), host.size()));
    must(copy_in(backend, buffer.data(), host.data(), host.size()));
  };
  const auto results = [&] { return bench.out(y, static_cast<std::size_t>(tokens * wide)); };

  fill(x, tokens * width, 1);
  fill(y, tokens * wide, 1);
  const std::vector<double> before = results();
  const Graph graph = must(record(backend, steps));
  EXPECT_EQ(results(), before) << "recording ran the steps";
  for (int round = 0; round < 3; ++round) {
    fill(x, tokens * width, 1 + round);
    must(steps());
    const std::vector<double> want = results();
    fill(y, tokens * wide, 1);
    must(replay(backend, graph));
    EXPECT_EQ(results(), want) << "round " << round;
  }
}

TEST_P(GraphTest, CopiesAndFailuresInsideAreRefused) {
  const Backend backend = open(GetParam());
  if (backend.kernels->record == nullptr) GTEST_SKIP() << GetParam() << " records nothing";
  const Buffer buffer = must(allocate(backend, 64));
  std::byte host[64] = {};
  EXPECT_THAT(
      message_of(record(backend, [&] { return copy_in(backend, buffer.data(), host, 64); })),
      HasSubstr("copy_in: inside record()"));
  EXPECT_THAT(message_of(record(backend, [&] { return allocate(backend, 64).status(); })),
              HasSubstr("allocate: inside record()"));
  EXPECT_EQ(message_of(record(backend, [] { return cancelled("enough"); })), "enough");
  // The stream works again.
  must(copy_in(backend, buffer.data(), host, 64));
  must(synchronize(backend));
}

// In order with the copies before and behind it; both kinds of memory hold what was written.
TEST_P(GraphTest, CopyInTakesMemoryOfTheBackendToo) {
  const Backend backend = open(GetParam());
  const std::vector<std::int32_t> numbers = {3, 1, 4, 1, 5, 9, 2, 6};
  const std::size_t bytes = numbers.size() * sizeof(numbers[0]);
  const Buffer first = must(allocate(backend, bytes));
  const Buffer second = must(allocate(backend, bytes));
  const Buffer visible = must(allocate_visible(backend, bytes));
  must(copy_in(backend, first.data(), numbers.data(), bytes));
  must(copy_in(backend, second.data(), first.data(), bytes));
  must(copy_in(backend, visible.data(), second.data(), bytes));
  must(synchronize(backend));
  const auto* const seen = visible.as<const std::int32_t>();
  EXPECT_EQ(std::vector<std::int32_t>(seen, seen + numbers.size()), numbers);
}

INSTANTIATE_TEST_SUITE_P(Backends, GraphTest, ::testing::ValuesIn(all_backends()), backend_id);

}  // namespace
}  // namespace infllm::testing
