// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/transformer.h"

#include <fmt/format.h>
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "infllm/backend/open.h"
#include "infllm/ops/kernels.h"
#include "tests/support/budget.h"
#include "tests/support/grid.h"
#include "tests/support/refusal.h"

namespace infllm::testing {
namespace {

using ::testing::HasSubstr;

// A backend with the numbers of one check on it.
struct Bench {
  explicit Bench(Backend b) : backend(std::move(b)) {}

  Buffer in(const std::vector<double>& values) const {
    return upload(backend, values, backend.kernels->activation);
  }
  std::vector<double> out(const Buffer& buffer, std::size_t count) const {
    return download(backend, buffer, static_cast<std::int64_t>(count), backend.kernels->activation);
  }
  Backend backend;
};

class TransformerTest : public ::testing::TestWithParam<std::string> {
 protected:
  // Runs `step` on the exact reference, on the one that rounds operands to `operand`, and on the
  // backend; holds the latter to the budget.
  template <typename StepFunction>
  void expect_within_budget(const std::string& op, DType operand, std::vector<std::int64_t> shape,
                            StepFunction&& step) {
    const Bench kernel(open(GetParam()));
    const DType activation = kernel.backend.kernels->activation;
    Ledger ledger({.op = op, .backend = GetParam(), .dtype = operand, .name = "inline"},
                  Error::kAbsolute, activation);
    const std::vector<double> got = step(kernel);
    const std::vector<double> exact = step(Bench(open("reference")));
    const std::vector<double> rounded = step(Bench(open_rounded(operand, activation)));
    ledger.add(0, std::move(shape), got, exact, rounded);
    EXPECT_TRUE(ledger.balanced());
  }
};

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
  const LinearWeight weight = pack_linear(bench.backend, parts, p.format, p.group_size).value();
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
      allocate(bench.backend, linear_workspace_bytes(bench.backend, params)).value();
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
    for (const std::int64_t tokens : {1, 2, 5, 6, 7, 13, 33, 70}) {
      list.push_back({format, group, tokens, 128, {96}, 1, false, DType::kF32});
    }
    // Sizes that are no multiple of anything; stacked matrices; a residual sum.
    list.push_back({format, group, 1, 131, {65}, 1, false, DType::kBF16});
    list.push_back({format, group, 9, 131, {1, 70, 33}, 1, false, DType::kF32});
    list.push_back({format, group, 3, 300, {64, 64}, 0.3f, true, DType::kBF16});
    list.push_back({format, group, 17, 577, {130}, -1.5f, true, DType::kF32});
    list.push_back({format, 0, 4, 1, {3}, 1, false, DType::kF32});
    list.push_back({format, 0, 1, 7, {1}, 2, true, DType::kF32});
  }
  return list;
}

TEST_P(TransformerTest, Linear) {
  if (open(GetParam(), 1).kernels->linear.run == nullptr) GTEST_SKIP() << "no linear";
  for (const Product& p : products()) {
    // int8 codes are exact in bf16: an honest kernel multiplies them with bf16 activations.
    const DType operand = p.format == WeightFormat::kBF16 || p.format == WeightFormat::kI8
                              ? DType::kBF16
                              : DType::kF32;
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
TEST_P(TransformerTest, LinearIsBitwiseTheSameInCompany) {
  if (open(GetParam(), 1).kernels->linear.run == nullptr) GTEST_SKIP() << "no linear";
  for (const WeightFormat format : {WeightFormat::kF32, WeightFormat::kBF16, WeightFormat::kI8}) {
    Random random(9);
    const std::int64_t inputs = 200, outputs = 150, tokens = 40;
    const std::vector<double> w = random.normals(inputs * outputs, DType::kF32);
    const std::vector<float> narrow(w.begin(), w.end());
    const TensorView part = TensorView::matrix(narrow.data(), DType::kF32, outputs, inputs);
    const std::vector<double> x = random.normals(tokens * inputs, DType::kF32);
    const auto run = [&](int threads, std::int64_t first, std::int64_t count) {
      const Bench bench(open(GetParam(), threads));
      const LinearWeight weight = pack_linear(bench.backend, {&part, 1}, format).value();
      const std::vector<double> rows(x.begin() + first * inputs,
                                     x.begin() + (first + count) * inputs);
      const Buffer in = bench.in(rows);
      const Buffer out =
          poisoned(bench.backend, count * outputs, bench.backend.kernels->activation);
      const LinearParams params{
          .weight = &weight, .tokens = count, .x = in.data(), .y = out.data()};
      const Buffer workspace =
          allocate(bench.backend, linear_workspace_bytes(bench.backend, params)).value();
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

TEST_P(TransformerTest, RmsNorm) {
  if (open(GetParam(), 1).kernels->rms_norm.run == nullptr) GTEST_SKIP() << "no rms_norm";
  for (const auto& [tokens, width] : {std::pair{1, 64}, {3, 1}, {5, 77}, {2, 2048}}) {
    for (const double scale : {1.0, 1e-6, 1e6}) {
      for (const bool in_place : {false, true}) {
        const std::int64_t count = std::int64_t{tokens} * width;
        expect_within_budget("rms_norm", DType::kF32, {tokens, width}, [&](const Bench& bench) {
          Random random(static_cast<std::uint64_t>(count));
          const Buffer x = bench.in(random.normals(count, DType::kF32, scale));
          const std::vector<double> w = random.normals(width, DType::kBF16);
          const std::vector<float> narrow(w.begin(), w.end());
          const Buffer weight =
              upload_vector(bench.backend, TensorView::vector(narrow.data(), DType::kF32, width))
                  .value();
          const Buffer y =
              in_place ? x : poisoned(bench.backend, count, bench.backend.kernels->activation);
          must(rms_norm(bench.backend, {.tokens = tokens,
                                        .width = width,
                                        .x = x.data(),
                                        .weight = weight.data(),
                                        .epsilon = 1e-5f,
                                        .y = y.data()}));
          return bench.out(y, static_cast<std::size_t>(count));
        });
      }
    }
  }
}

TEST_P(TransformerTest, Rope) {
  if (open(GetParam(), 1).kernels->rope.run == nullptr) GTEST_SKIP() << "no rope";
  for (const std::int32_t dim : {2, 64, 80, 128}) {
    const std::int64_t tokens = 5;
    const std::int32_t heads = 3;
    const std::int64_t stride = heads * dim + 7;  // a fused projection has more columns
    expect_within_budget("rope", DType::kF32, {tokens, stride}, [&](const Bench& bench) {
      Random random(static_cast<std::uint64_t>(dim));
      const Buffer x = bench.in(random.normals(tokens * stride, DType::kF32));
      std::vector<float> cos, sin;
      for (std::int64_t i = 0; i < tokens * dim / 2; ++i) {
        const double angle = random.normal();
        cos.push_back(static_cast<float>(std::cos(angle)));
        sin.push_back(static_cast<float>(std::sin(angle)));
      }
      must(rope(bench.backend, {.tokens = tokens,
                                .heads = heads,
                                .head_dim = dim,
                                .row_stride = stride,
                                .x = x.data(),
                                .cos = cos.data(),
                                .sin = sin.data()}));
      return bench.out(x, static_cast<std::size_t>(tokens * stride));
    });
  }
}

TEST_P(TransformerTest, Swiglu) {
  if (open(GetParam(), 1).kernels->swiglu.run == nullptr) GTEST_SKIP() << "no swiglu";
  for (const auto& [tokens, width] : {std::pair{1, 1}, {3, 63}, {7, 200}}) {
    const std::int64_t count = std::int64_t{tokens} * width;
    for (const double scale : {1.0, 50.0}) {  // exp(-z) overflows float beyond 88
      expect_within_budget("swiglu", DType::kF32, {tokens, width}, [&](const Bench& bench) {
        Random random(static_cast<std::uint64_t>(count));
        const Buffer x = bench.in(random.normals(2 * count, DType::kF32, scale));
        const Buffer y = poisoned(bench.backend, count, bench.backend.kernels->activation);
        must(swiglu(bench.backend,
                    {.tokens = tokens, .width = width, .x = x.data(), .y = y.data()}));
        return bench.out(y, static_cast<std::size_t>(count));
      });
    }
  }
}

TEST_P(TransformerTest, Embed) {
  if (open(GetParam(), 1).kernels->embed.run == nullptr) GTEST_SKIP() << "no embed";
  const std::int64_t vocabulary = 11, width = 37;
  Random random(1);
  const std::vector<double> values = random.normals(vocabulary * width, DType::kBF16);
  const std::vector<std::int32_t> ids = {10, 0, 3, 3};
  const std::vector<float> f32(values.begin(), values.end());
  std::vector<BF16> bf16;
  std::vector<F16> f16;
  for (const float v : f32) {
    bf16.push_back(BF16(v));
    f16.push_back(F16(v));
  }
  for (const TensorView& table : {TensorView::matrix(f32.data(), DType::kF32, vocabulary, width),
                                  TensorView::matrix(bf16.data(), DType::kBF16, vocabulary, width),
                                  TensorView::matrix(f16.data(), DType::kF16, vocabulary, width)}) {
    expect_within_budget("embed", DType::kF32, {4, width}, [&](const Bench& bench) {
      const EmbeddingTable uploaded = upload_table(bench.backend, table).value();
      const Buffer y = poisoned(bench.backend, 4 * width, bench.backend.kernels->activation);
      must(embed(
          bench.backend,
          {.table = &uploaded, .tokens = 4, .token_ids = ids.data(), .scale = 12, .y = y.data()}));
      return bench.out(y, static_cast<std::size_t>(4 * width));
    });
  }
}

TEST_P(TransformerTest, Gather) {
  if (open(GetParam(), 1).kernels->gather.run == nullptr) GTEST_SKIP() << "no gather";
  const std::int64_t stride = 29, width = 17, first_column = 5, count = 4;
  const Bench bench(open(GetParam()));
  Random random(1);
  const std::vector<double> x = random.normals(6 * stride, DType::kF32);
  const Buffer in = bench.in(x);
  const std::vector<std::int32_t> rows = {5, 0, 0, 2};
  for (const bool all : {false, true}) {
    const Buffer y = poisoned(bench.backend, count * width, bench.backend.kernels->activation);
    must(gather(bench.backend, {.count = count,
                                .width = width,
                                .row_stride = stride,
                                .first_column = first_column,
                                .rows = all ? nullptr : rows.data(),
                                .x = in.data(),
                                .y = y.data()}));
    std::vector<double> want;
    for (std::int64_t i = 0; i < count; ++i) {
      const auto row = x.begin() + (all ? i : rows[i]) * stride + first_column;
      want.insert(want.end(), row, row + width);
    }
    EXPECT_EQ(bench.out(y, want.size()), want);
  }
}

TEST_P(TransformerTest, ReadFloats) {
  const Bench bench(open(GetParam()));
  const Buffer x = bench.in({1.5, -2, 0.25});
  float out[3];
  must(read_floats(bench.backend, x.data(), 3, out));
  EXPECT_THAT(out, ::testing::ElementsAre(1.5f, -2.0f, 0.25f));
}

INSTANTIATE_TEST_SUITE_P(Backends, TransformerTest, ::testing::ValuesIn(kernel_backends()),
                         backend_id);

// Integers multiply exactly: the reference keeps f64 as it is, and columns without it say so.
TEST(LinearF64, IsTheReferencesOwn) {
  const std::vector<double> w = {1, 2, 3, 4, 5, 0.5 + 0x1p-40};
  const TensorView matrix = TensorView::matrix(w.data(), DType::kF64, 2, 3);
  const Bench bench(open("reference"));
  const LinearWeight weight = pack_linear(bench.backend, {&matrix, 1}, WeightFormat::kF64).value();
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

TEST(TransformerRefusal, NamesWhatIsWrong) {
  const Backend backend = open("reference");
  const std::vector<float> w = {1, 2, 3, INFINITY};
  const TensorView matrix = TensorView::matrix(w.data(), DType::kF32, 2, 2);
  const TensorView vector = TensorView::vector(w.data(), DType::kF32, 4);
  const auto pack = [&](std::vector<TensorView> parts, WeightFormat format = WeightFormat::kF32,
                        std::int32_t group = 0) {
    return message_of(pack_linear(backend, parts, format, group));
  };
  EXPECT_EQ(pack({}), "pack_linear: no matrices, expected at least one");
  EXPECT_THAT(pack({vector}), HasSubstr("a f32 tensor of shape [4], expected a non-empty matrix"));
  EXPECT_THAT(pack({matrix, TensorView::matrix(w.data(), DType::kF32, 4, 1)}),
              HasSubstr("matrices of shapes [2, 2] and [4, 1] do not stack"));
  EXPECT_THAT(pack({matrix}, WeightFormat::kI8, 3), HasSubstr("group_size = 3 for 2 inputs"));
  EXPECT_THAT(pack({matrix}, WeightFormat::kF32, 2),
              HasSubstr("group_size = 2 for a format without scales"));
  EXPECT_THAT(pack({matrix}, WeightFormat::kI8), HasSubstr("inf at output 1, input 1"));
  EXPECT_THAT(pack({TensorView::matrix(w.data(), DType::kI32, 2, 2)}),
              HasSubstr("a i32 tensor of shape [2, 2], expected a non-empty matrix"));
  EXPECT_THAT(
      message_of(upload_vector(backend, matrix)),
      HasSubstr("upload_vector: a f32 tensor of shape [2, 2], expected a non-empty vector"));
  EXPECT_THAT(message_of(upload_table(backend, vector)), HasSubstr("upload_table: a f32 tensor"));

  const LinearWeight weight = pack_linear(backend, {&matrix, 1}, WeightFormat::kF32).value();
  double scratch = 0;
  EXPECT_EQ(message_of(linear(backend, {.tokens = 1}, {})),
            "linear: weight is null, expected an array");
  EXPECT_EQ(message_of(linear(backend, {.weight = &weight, .tokens = -1}, {})),
            "linear: tokens = -1, expected at least 0");
  EXPECT_EQ(message_of(linear(backend, {.weight = &weight, .tokens = 1}, {})),
            "linear: x is null, expected an array");
  EXPECT_THAT(
      message_of(linear(
          backend, {.weight = &weight, .tokens = 1, .x = &w, .y = &scratch, .alpha = NAN}, {})),
      HasSubstr("linear: alpha = nan, expected a finite number"));
  const LinearWeight empty;
  EXPECT_THAT(message_of(linear(backend, {.weight = &empty}, {})), HasSubstr("an empty weight"));
  EXPECT_THAT(message_of(rms_norm(backend, {.tokens = 1, .width = 0})),
              HasSubstr("rms_norm: width = 0, expected at least 1"));
  EXPECT_THAT(message_of(rms_norm(backend, {.tokens = 1, .width = 1, .epsilon = -1})),
              HasSubstr("rms_norm: epsilon = -1"));
  EXPECT_THAT(message_of(rope(backend, {.tokens = 1, .heads = 1, .head_dim = 3, .row_stride = 3})),
              HasSubstr("rope: head_dim = 3, expected an even number"));
  EXPECT_THAT(message_of(rope(backend, {.tokens = 1, .heads = 2, .head_dim = 4, .row_stride = 7})),
              HasSubstr("row_stride (heads * head_dim or more) = 7, expected at least 8"));
  EXPECT_THAT(message_of(swiglu(backend, {.tokens = 1, .width = 2})),
              HasSubstr("swiglu: x is null"));
  EXPECT_THAT(
      message_of(gather(backend, {.count = 1, .width = 4, .row_stride = 4, .first_column = 1})),
      HasSubstr("row_stride (first_column + width or more) = 4, expected at least 5"));
  EXPECT_EQ(message_of(embed(backend, {.tokens = 1})), "embed: table is null, expected an array");
}

}  // namespace
}  // namespace infllm::testing
