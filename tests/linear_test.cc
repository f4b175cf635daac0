// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <cmath>

#include "infllm/ops/transformer.h"
#include "tests/support/grid.h"
#include "tests/support/plumbing.h"
#include "tests/support/refusal.h"

namespace infllm::testing {
namespace {

using ::testing::HasSubstr;

class LinearTest : public PlumbingTest {};

struct Product {
  WeightFormat format;
  std::int32_t group_size;
  std::int64_t tokens;
  std::int64_t inputs;
  std::vector<std::int64_t> outputs;  // of each stacked matrix
  float alpha;
  bool accumulate;
  DType stored;  // of the matrices given
};

std::vector<double> multiply(const Bench& bench, const Product& p) {
  Random random(static_cast<std::uint64_t>(p.tokens * 1000 + p.inputs));
  std::vector<std::vector<float>> values;
  std::vector<std::vector<std::uint16_t>> halves;
  std::vector<TensorView> parts;
  std::int64_t outputs = 0;
  for (const std::int64_t rows : p.outputs) {
    const std::vector<double> w = random.normals(rows * p.inputs, p.stored);
    values.emplace_back(w.begin(), w.end());
    outputs += rows;
  }
  for (std::size_t i = 0; i < values.size(); ++i) {
    const void* data = values[i].data();
    if (p.stored == DType::kBF16) {
      std::vector<std::uint16_t> bits;
      for (const float w : values[i]) bits.push_back(BF16(w).bits);
      halves.push_back(std::move(bits));
      data = halves.back().data();
    }
    parts.push_back(TensorView::matrix(data, p.stored, p.outputs[i], p.inputs));
  }
  const LinearWeight weight = must(pack_linear(bench.backend, parts, p.format, p.group_size));
  EXPECT_EQ(weight.outputs, outputs);
  EXPECT_EQ(weight.inputs, p.inputs);
  const Buffer x = bench.in(random.normals(p.tokens * p.inputs, DType::kF32));
  const std::vector<double> before = random.normals(p.tokens * outputs, DType::kF32);
  const Buffer y =
      p.accumulate ? bench.in(before)
                   : poisoned(bench.backend, p.tokens * outputs, bench.backend.kernels->activation);
  const LinearParams params{.weight = &weight,
                            .tokens = p.tokens,
                            .x = x.data(),
                            .y = y.data(),
                            .alpha = p.alpha,
                            .accumulate = p.accumulate};
  const Buffer workspace =
      must(allocate(bench.backend, linear_workspace_bytes(bench.backend, params)));
  must(linear(bench.backend, params, {workspace.data(), workspace.bytes()}));
  return bench.out(y, before.size());
}

std::vector<Product> products() {
  std::vector<Product> list;
  const std::vector<std::pair<WeightFormat, std::int32_t>> formats = {{WeightFormat::kF32, 0},
                                                                      {WeightFormat::kBF16, 0},
                                                                      {WeightFormat::kI8, 0},
                                                                      {WeightFormat::kI8, 32},
                                                                      {WeightFormat::kI8, 128}};
  for (const auto& [format, group] : formats) {
    for (const std::int64_t tokens : {1, 2, 3, 4, 5, 6, 7, 13, 33, 70}) {
      list.push_back({format, group, tokens, 128, {96}, 1, false, DType::kF32});
    }
    // Sizes that are no multiple of anything; stacked matrices; a residual sum.
    list.push_back({format, group, 1, 131, {65}, 1, false, DType::kBF16});
    list.push_back({format, group, 3, 2064, {40, 24}, 0.5f, true, DType::kF32});
    // One token: whole and cut stages of a device's stream of weights.
    list.push_back({format, group, 1, 512, {1030}, 1, false, DType::kBF16});
    list.push_back({format, group, 1, 4096, {300, 7}, 0.5f, true, DType::kF32});
    list.push_back({format, group, 1, 16384, {41}, 1, false, DType::kF32});
    list.push_back({format, group, 9, 131, {1, 70, 33}, 1, false, DType::kF32});
    list.push_back({format, group, 3, 300, {64, 64}, 0.3f, true, DType::kBF16});
    list.push_back({format, group, 17, 577, {130}, -1.5f, true, DType::kF32});
    list.push_back({format, 0, 4, 1, {3}, 1, false, DType::kF32});
    list.push_back({format, 0, 1, 7, {1}, 2, true, DType::kF32});
  }
  return list;
}

// A column that computes in 16 bits keeps weights in its own type and has no int8.
bool packs(const std::string& backend, WeightFormat format) {
  const DType numbers = numbers_type(open(backend, 1));
  return numbers == DType::kF32 || format == WeightFormat::kF32 ||
         (format == WeightFormat::kBF16 && numbers == DType::kBF16);
}

TEST_P(LinearTest, StaysWithinTheBudget) {
  if (open(GetParam(), 1).kernels->linear.run == nullptr) GTEST_SKIP() << "no linear";
  const DType numbers = numbers_type(open(GetParam(), 1));
  for (const Product& p : products()) {
    if (!packs(GetParam(), p.format)) continue;
    // int8 codes are exact in bf16: an honest kernel multiplies them with bf16 activations.
    const DType operand =
        p.format == WeightFormat::kBF16 || p.format == WeightFormat::kI8 ? DType::kBF16 : numbers;
    std::int64_t outputs = 0;
    for (const std::int64_t rows : p.outputs) outputs += rows;
    const auto run = [&](const Bench& bench) { return multiply(bench, p); };
    expect_within_budget(
        fmt::format("linear format {} group {} tokens {} inputs {} alpha {} accumulate {}",
                    static_cast<int>(p.format), p.group_size, p.tokens, p.inputs, p.alpha,
                    p.accumulate),
        operand, {p.tokens, outputs}, run);
  }
}

// A token's numbers are the same alone, in any batch, and with any number of threads.
TEST_P(LinearTest, IsBitwiseTheSameInCompany) {
  if (open(GetParam(), 1).kernels->linear.run == nullptr) GTEST_SKIP() << "no linear";
  if (is_device(open(GetParam(), 1))) {
    GTEST_SKIP() << "the order of a device's sums depends on the number of tokens";
  }
  for (const WeightFormat format : {WeightFormat::kF32, WeightFormat::kBF16, WeightFormat::kI8}) {
    Random random(9);
    const std::int64_t inputs = 200, outputs = 150, tokens = 40;
    const std::vector<double> w = random.normals(inputs * outputs, DType::kF32);
    const std::vector<float> narrow(w.begin(), w.end());
    const TensorView part = TensorView::matrix(narrow.data(), DType::kF32, outputs, inputs);
    const std::vector<double> x = random.normals(tokens * inputs, DType::kF32);
    const auto run = [&](int threads, std::int64_t first, std::int64_t count) {
      const Bench bench(open(GetParam(), threads));
      const LinearWeight weight = must(pack_linear(bench.backend, {&part, 1}, format));
      const std::vector<double> rows(x.begin() + first * inputs,
                                     x.begin() + (first + count) * inputs);
      const Buffer in = bench.in(rows);
      const Buffer out =
          poisoned(bench.backend, count * outputs, bench.backend.kernels->activation);
      const LinearParams params{
          .weight = &weight, .tokens = count, .x = in.data(), .y = out.data()};
      const Buffer workspace =
          must(allocate(bench.backend, linear_workspace_bytes(bench.backend, params)));
      must(linear(bench.backend, params, {workspace.data(), workspace.bytes()}));
      return bench.out(out, static_cast<std::size_t>(count * outputs));
    };
    const std::vector<double> all = run(2, 0, tokens);
    EXPECT_EQ(run(1, 0, tokens), all) << GetParam();
    EXPECT_EQ(run(3, 0, tokens), all) << GetParam();
    for (const auto& [first, count] : {std::pair{0, 1}, {7, 1}, {11, 5}, {20, 20}}) {
      const std::vector<double> want(all.begin() + first * outputs,
                                     all.begin() + (first + count) * outputs);
      EXPECT_EQ(run(1, first, count), want) << GetParam() << " token " << first;
    }
  }
}

// For as many tokens, which a device multiplies by the same kernel: whatever the other rows hold.
TEST_P(LinearTest, OtherRowsChangeNothing) {
  const Bench bench(open(GetParam()));
  if (bench.backend.kernels->linear.run == nullptr) GTEST_SKIP() << "no linear";
  const std::int64_t inputs = 200, outputs = 150;
  for (const WeightFormat format : {WeightFormat::kF32, WeightFormat::kBF16, WeightFormat::kI8}) {
    if (!packs(GetParam(), format)) continue;
    Random random(10);
    const std::vector<double> w = random.normals(inputs * outputs, DType::kF32);
    const std::vector<float> narrow(w.begin(), w.end());
    const TensorView part = TensorView::matrix(narrow.data(), DType::kF32, outputs, inputs);
    const LinearWeight weight = must(pack_linear(bench.backend, {&part, 1}, format));
    for (const std::int64_t tokens : {2, 5, 17, 130}) {
      const auto run = [&](const std::vector<double>& x) {
        const Buffer in = bench.in(x);
        const Buffer out =
            poisoned(bench.backend, tokens * outputs, bench.backend.kernels->activation);
        const LinearParams params{
            .weight = &weight, .tokens = tokens, .x = in.data(), .y = out.data()};
        const Buffer workspace =
            must(allocate(bench.backend, linear_workspace_bytes(bench.backend, params)));
        must(linear(bench.backend, params, {workspace.data(), workspace.bytes()}));
        return bench.out(out, static_cast<std::size_t>(tokens * outputs));
      };
      std::vector<double> x = random.normals(tokens * inputs, DType::kF32);
      const std::vector<double> before = run(x);
      for (std::int64_t t = 1; t < tokens; t += 2) {
        for (std::int64_t i = 0; i < inputs; ++i) x[t * inputs + i] *= -3;
      }
      const std::vector<double> after = run(x);
      for (std::int64_t t = 0; t < tokens; ++t) {
        const auto same =
            std::equal(before.begin() + t * outputs, before.begin() + (t + 1) * outputs,
                       after.begin() + t * outputs);
        EXPECT_EQ(same, t % 2 == 0) << GetParam() << " token " << t << " of " << tokens;
      }
    }
  }
}

// Squares of small integers add up exactly in any order, so the two ways differ in nothing.
TEST_P(LinearTest, NormalisesAsRmsNormWould) {
  const Bench bench(open(GetParam()));
  const DType type = bench.backend.kernels->activation;
  const std::int64_t outputs = 150;
  for (const std::int64_t inputs : {8, 104, 1000, 4096}) {
    Random random(static_cast<std::uint64_t>(inputs));
    const std::vector<double> w = random.normals(inputs * outputs, type);
    const std::vector<float> narrow(w.begin(), w.end());
    const TensorView part = TensorView::matrix(narrow.data(), DType::kF32, outputs, inputs);
    const LinearWeight weight = must(pack_linear(bench.backend, {&part, 1}, WeightFormat::kBF16));
    std::vector<double> x;
    for (std::int64_t i = 0; i < inputs; ++i)
      x.push_back(static_cast<double>(random.below(33)) - 16);
    std::vector<float> scales;
    for (std::int64_t i = 0; i < inputs; ++i) scales.push_back(static_cast<float>(random.normal()));
    const TensorView vector{
        .data = scales.data(), .dtype = DType::kF32, .rank = 1, .shape = {inputs}};
    const Buffer norm = must(upload_vector(bench.backend, vector));
    const Buffer in = bench.in(x);
    const Buffer normed = poisoned(bench.backend, inputs, type);
    const Buffer together = poisoned(bench.backend, outputs, type);
    const Buffer apart = poisoned(bench.backend, outputs, type);
    LinearParams params{.weight = &weight,
                        .tokens = 1,
                        .x = in.data(),
                        .y = together.data(),
                        .norm = norm.data(),
                        .epsilon = 1e-5f};
    if (!linear_fuses(bench.backend, params)) GTEST_SKIP() << "calls rms_norm() first";
    must(linear(bench.backend, params, {}));
    must(rms_norm(bench.backend, {.tokens = 1,
                                  .width = inputs,
                                  .x = in.data(),
                                  .weight = norm.data(),
                                  .epsilon = 1e-5f,
                                  .y = normed.data()}));
    must(linear(bench.backend,
                {.weight = &weight, .tokens = 1, .x = normed.data(), .y = apart.data()}, {}));
    EXPECT_EQ(bench.out(together, static_cast<std::size_t>(outputs)),
              bench.out(apart, static_cast<std::size_t>(outputs)))
        << inputs << " inputs";
  }
}

// The fused way rounds where the numbers would have been written, so it differs in nothing either.
TEST_P(LinearTest, GatesAsSwigluWould) {
  const Bench bench(open(GetParam()));
  const DType type = bench.backend.kernels->activation;
  for (const auto& [inputs, width] : {std::pair{8, 3}, {104, 131}, {4096, 1000}, {16384, 140}}) {
    Random random(static_cast<std::uint64_t>(inputs));
    std::vector<double> w = random.normals(2 * std::int64_t{width} * inputs, type);
    const std::vector<float> narrow(w.begin(), w.end());
    const TensorView part =
        TensorView::matrix(narrow.data(), DType::kF32, 2 * std::int64_t{width}, inputs);
    const LinearWeight weight = must(pack_linear(bench.backend, {&part, 1}, WeightFormat::kBF16));
    const Buffer x = bench.in(random.normals(inputs, type, 4 / std::sqrt(inputs)));
    const Buffer product = poisoned(bench.backend, 2 * std::int64_t{width}, type);
    const Buffer together = poisoned(bench.backend, width, type);
    const Buffer apart = poisoned(bench.backend, width, type);
    LinearParams params{
        .weight = &weight, .tokens = 1, .x = x.data(), .y = together.data(), .gated = true};
    if (!linear_fuses(bench.backend, params)) GTEST_SKIP() << "calls swiglu() behind it";
    must(linear(bench.backend, params, {}));
    params.gated = false;
    params.y = product.data();
    must(linear(bench.backend, params, {}));
    must(swiglu(bench.backend,
                {.tokens = 1, .width = width, .x = product.data(), .y = apart.data()}));
    EXPECT_EQ(bench.out(together, static_cast<std::size_t>(width)),
              bench.out(apart, static_cast<std::size_t>(width)))
        << inputs << " inputs";
  }
}

TEST_P(LinearTest, RefusesToFuseWhatItCannot) {
  const Bench bench(open(GetParam()));
  const std::vector<float> w(8 * 7, 1);
  const TensorView part = TensorView::matrix(w.data(), DType::kF32, 7, 8);
  const LinearWeight weight = must(pack_linear(bench.backend, {&part, 1}, WeightFormat::kBF16));
  const Buffer x = bench.in(std::vector<double>(8, 1));
  const Buffer y = bench.in(std::vector<double>(7, 1));
  const LinearParams params{
      .weight = &weight, .tokens = 1, .x = x.data(), .y = y.data(), .gated = true};
  EXPECT_FALSE(linear_fuses(bench.backend, params)) << "7 outputs make no pairs";
  EXPECT_THAT(message_of(linear(bench.backend, params, {})), HasSubstr("1 x 8 to 7 numbers"));
}

INSTANTIATE_TEST_SUITE_P(Backends, LinearTest, ::testing::ValuesIn(kernel_backends()), backend_id);

// Integers multiply exactly: the reference keeps f64 as it is, and columns without it say so.
TEST(LinearF64, IsTheReferencesOwn) {
  const std::vector<double> w = {1, 2, 3, 4, 5, 0.5 + 0x1p-40};
  const TensorView matrix = TensorView::matrix(w.data(), DType::kF64, 2, 3);
  const Bench bench(open("reference"));
  const LinearWeight weight = must(pack_linear(bench.backend, {&matrix, 1}, WeightFormat::kF64));
  const Buffer x = bench.in({1, 10, 1});
  const Buffer y = bench.in({0.5, -54});
  const LinearParams params{
      .weight = &weight, .tokens = 1, .x = x.data(), .y = y.data(), .alpha = 2, .accumulate = true};
  std::vector<std::byte> workspace(linear_workspace_bytes(bench.backend, params));
  must(linear(bench.backend, params, workspace));
  EXPECT_THAT(bench.out(y, 2), ::testing::ElementsAre(48.5, 55 + 0x1p-39));
  for (const std::string& name : kernel_backends()) {
    EXPECT_THAT(message_of(pack_linear(open(name), {&matrix, 1}, WeightFormat::kF64)),
                HasSubstr("f64"));
  }
}

TEST(QuantizeInt8, IsRoundToNearestOfTheGroupsLargest) {
  const std::vector<float> w = {127, -64.5f, 0.4f, 0, 1, -2, 0, 0, 0};
  std::vector<std::int8_t> codes(w.size());
  std::vector<float> scales(2 * 3);
  must(quantize_int8(TensorView::matrix(w.data(), DType::kF32, 3, 3), 2, codes.data(),
                     scales.data()));
  EXPECT_THAT(scales, ::testing::ElementsAre(1.0f, 0.4f / 127, 1.0f / 127, 2.0f / 127, 0, 0));
  EXPECT_THAT(codes, ::testing::ElementsAre(127, -64, 127, 0, 127, -127, 0, 0, 0));
}

TEST(QuantizeInt8, ErrsByHalfAStepAtMost) {
  Random random(2);
  const std::vector<double> w = random.normals(40 * 100, DType::kF32);
  const std::vector<float> narrow(w.begin(), w.end());
  std::vector<std::int8_t> codes(w.size());
  std::vector<float> scales(40 * 4);
  must(quantize_int8(TensorView::matrix(narrow.data(), DType::kF32, 40, 100), 32, codes.data(),
                     scales.data()));
  for (std::size_t i = 0; i < w.size(); ++i) {
    const double scale = scales[i / 100 * 4 + i % 100 / 32];
    // Half a step, and the rounding of the scale and of the quotient to float.
    ASSERT_LE(std::fabs(codes[i] * scale - w[i]), scale * (0.5 + 127 * 0x1p-23)) << i;
  }
}

}  // namespace
}  // namespace infllm::testing
