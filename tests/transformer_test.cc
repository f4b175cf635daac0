// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/transformer.h"

#include <gmock/gmock.h>

#include <cmath>

#include "tests/support/grid.h"
#include "tests/support/plumbing.h"
#include "tests/support/refusal.h"

namespace infllm::testing {
namespace {

using ::testing::HasSubstr;

class TransformerTest : public PlumbingTest {};

TEST_P(TransformerTest, RmsNorm) {
  if (open(GetParam(), 1).kernels->rms_norm.run == nullptr) GTEST_SKIP() << "no rms_norm";
  for (const auto& [tokens, width] : {std::pair{1, 64}, {3, 1}, {5, 77}, {2, 2048}}) {
    for (const double scale : {1.0, 1e-6, 1e6}) {
      if (scale != 1 && numbers_type(open(GetParam(), 1)) == DType::kF16) continue;  // no such f16
      for (const bool in_place : {false, true}) {
        const std::int64_t count = std::int64_t{tokens} * width;
        expect_within_budget("rms_norm", DType::kF32, {tokens, width}, [&](const Bench& bench) {
          Random random(static_cast<std::uint64_t>(count));
          const Buffer x = bench.in(random.normals(count, DType::kF32, scale));
          const std::vector<double> w = random.normals(width, DType::kBF16);
          const std::vector<float> narrow(w.begin(), w.end());
          const Buffer weight = must(
              upload_vector(bench.backend, TensorView::vector(narrow.data(), DType::kF32, width)));
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

// However a column shares rows out: many at a time give what a few give.
TEST_P(TransformerTest, RmsNormOfARowIsItsOwn) {
  const Bench bench(open(GetParam()));
  if (bench.backend.kernels->rms_norm.run == nullptr) GTEST_SKIP() << "no rms_norm";
  const DType type = bench.backend.kernels->activation;
  const std::int64_t tokens = 2201;
  for (const std::int64_t width : {77, 96, 4104}) {
    Random random(static_cast<std::uint64_t>(width));
    const std::vector<float> scales(static_cast<std::size_t>(width), 0.75f);
    const Buffer weight = bench.floats(scales);
    const Buffer x = bench.in(random.normals(tokens * width, type));
    const auto normed = [&](std::int64_t at_once) {
      const Buffer y = poisoned(bench.backend, tokens * width, type);
      for (std::int64_t first = 0; first < tokens; first += at_once) {
        const std::int64_t offset = first * width * size_of(type);
        must(rms_norm(bench.backend, {.tokens = std::min(at_once, tokens - first),
                                      .width = width,
                                      .x = x.data() + offset,
                                      .weight = weight.data(),
                                      .epsilon = 1e-5f,
                                      .y = y.data() + offset}));
      }
      return bench.out(y, static_cast<std::size_t>(tokens * width));
    };
    EXPECT_EQ(normed(tokens), normed(500)) << width << " numbers a row";
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
      const Buffer cosines = bench.floats(cos);
      const Buffer sines = bench.floats(sin);
      must(rope(bench.backend, {.tokens = tokens,
                                .heads = heads,
                                .head_dim = dim,
                                .row_stride = stride,
                                .x = x.data(),
                                .cos = cosines.as<float>(),
                                .sin = sines.as<float>()}));
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
      const EmbeddingTable uploaded = must(upload_table(bench.backend, table));
      const Buffer y = poisoned(bench.backend, 4 * width, bench.backend.kernels->activation);
      const Buffer token_ids = upload(bench.backend, ids);
      must(embed(bench.backend, {.table = &uploaded,
                                 .tokens = 4,
                                 .token_ids = token_ids.as<std::int32_t>(),
                                 .scale = 12,
                                 .y = y.data()}));
      return bench.out(y, static_cast<std::size_t>(4 * width));
    });
  }
}

TEST_P(TransformerTest, Gather) {
  if (open(GetParam(), 1).kernels->gather.run == nullptr) GTEST_SKIP() << "no gather";
  const std::int64_t stride = 29, width = 17, first_column = 5, count = 4;
  const Bench bench(open(GetParam()));
  Random random(1);
  const std::vector<double> x = random.normals(6 * stride, bench.numbers);
  const Buffer in = bench.in(x);
  const std::vector<std::int32_t> rows = {5, 0, 0, 2};
  const Buffer device_rows = upload(bench.backend, rows);
  for (const bool all : {false, true}) {
    const Buffer y = poisoned(bench.backend, count * width, bench.backend.kernels->activation);
    must(gather(bench.backend, {.count = count,
                                .width = width,
                                .row_stride = stride,
                                .first_column = first_column,
                                .rows = all ? nullptr : device_rows.as<std::int32_t>(),
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

  const LinearWeight weight = must(pack_linear(backend, {&matrix, 1}, WeightFormat::kF32));
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
