// SPDX-License-Identifier: Apache-2.0
//
// The best logits of a row, on every column that ranks them itself, against a sort on the host.
#include "infllm/ops/sampling.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>

#include "tests/support/grid.h"
#include "tests/support/refusal.h"
#include "tests/support/rig.h"

namespace infllm::testing {
namespace {

using ::testing::HasSubstr;

class TopLogitsTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    backend_ = open(GetParam());
    if (backend_.kernels->top_logits.run == nullptr) GTEST_SKIP() << "reads whole rows";
  }

  // Rows of `width` numbers of the activation type; NaN in the result where nobody wrote.
  std::vector<TopLogits> rank(const std::vector<double>& values, std::int64_t width,
                              const std::vector<float>& temperatures) {
    const auto rows = static_cast<std::int64_t>(temperatures.size());
    const Buffer logits = upload(backend_, values, backend_.kernels->activation);
    const Buffer heat = must(allocate(backend_, temperatures.size() * sizeof(float)));
    must(copy_in(backend_, heat.data(), temperatures.data(), heat.bytes()));
    const Buffer out = must(allocate_visible(backend_, temperatures.size() * sizeof(TopLogits)));
    std::memset(out.data(), 0xff, out.bytes());
    const TopLogitsParams params{.rows = rows,
                                 .vocabulary = width,
                                 .logits = logits.data(),
                                 .temperatures = heat.as<float>(),
                                 .out = out.as<TopLogits>()};
    const auto bytes = static_cast<std::int64_t>(top_logits_workspace_bytes(backend_, params));
    const Buffer workspace = poisoned(backend_, bytes / 4, DType::kF32);
    must(top_logits(backend_, params, {workspace.data(), workspace.bytes()}));
    must(synchronize(backend_));
    const auto* const result = out.as<const TopLogits>();
    return {result, result + rows};
  }

  void expect_row(const TopLogits& got, std::span<const double> row, float temperature) {
    std::vector<std::int32_t> order(row.size());
    std::iota(order.begin(), order.end(), 0);
    std::erase_if(order, [&](std::int32_t i) { return row[i] == -INFINITY; });
    std::ranges::stable_sort(order, std::greater(), [&](std::int32_t i) { return row[i]; });
    EXPECT_EQ(got.broken, -1);
    const std::size_t most = temperature > 0 ? TopLogits::kMost : 1;
    ASSERT_EQ(got.count, std::min(order.size(), most));
    for (std::int32_t i = 0; i < got.count; ++i) {
      ASSERT_EQ(got.token[i], order[i]) << "place " << i;
      ASSERT_EQ(got.logit[i], static_cast<float>(row[order[i]])) << "place " << i;
    }
    double weight = 0;
    for (const std::int32_t i : order) {
      if (temperature > 0) weight += std::exp((row[i] - row[order[0]]) / temperature);
    }
    EXPECT_NEAR(got.weight, weight, 1e-5 * weight);  // as the header says
  }

  Backend backend_;
};

TEST_P(TopLogitsTest, AreThoseOfASort) {
  Random random(3);
  for (const std::int64_t width : {1, 7, 255, 256, 257, 1000, 1024, 8200, 73448, 151936}) {
    const std::vector<float> temperatures = {0, 0.7f, 2};
    std::vector<double> values =
        random.normals(3 * width, backend_.kernels->activation, width % 2 == 0 ? 4 : 0.02);
    for (double& value : values) {
      if (random.below(50) == 0) value = -INFINITY;
    }
    values[0] = values[width] = values[2 * width] = -0.0;
    const std::vector<TopLogits> got = rank(values, width, temperatures);
    for (std::size_t row = 0; row < 3; ++row) {
      SCOPED_TRACE(::testing::Message() << width << " logits, row " << row);
      expect_row(got[row], std::span(values).subspan(row * width, width), temperatures[row]);
    }
  }
}

// Rows that no guess about the distribution survives: all equal, two values, everything large in
// one corner, few allowed.
TEST_P(TopLogitsTest, OfRowsWithManyEquals) {
  constexpr std::int64_t kWidth = 73448;
  std::vector<std::vector<double>> rows(6, std::vector<double>(kWidth, 1.0));
  for (std::int64_t i = 0; i < kWidth; ++i) {
    rows[1][i] = i % 300 == 0 ? 2 : 1;  // 245 above many equals
    rows[2][i] = i < 9000 ? 3 : -4;     // more than the list holds, of neighbours
    rows[3][i] = i < kWidth - 100 ? -INFINITY : 0.5;
    rows[4][i] = i % 1024 < 3 ? 5 : -5;  // in the share of few threads
    rows[5][i] = static_cast<double>(i % 7);
  }
  std::vector<double> values;
  for (const auto& row : rows) values.insert(values.end(), row.begin(), row.end());
  for (const float temperature : {1.0f, 0.0f}) {
    const std::vector<TopLogits> got =
        rank(values, kWidth, std::vector<float>(rows.size(), temperature));
    for (std::size_t row = 0; row < rows.size(); ++row) {
      SCOPED_TRACE(::testing::Message() << "row " << row << " at temperature " << temperature);
      expect_row(got[row], rows[row], temperature);
    }
  }
}

TEST_P(TopLogitsTest, BrokenAndForbiddenRowsAreTold) {
  constexpr std::int64_t kWidth = 1000;
  std::vector<double> values(5 * kWidth, 0.25);
  values[700] = NAN;
  values[kWidth + 5] = INFINITY;
  values[kWidth + 900] = NAN;
  std::fill_n(values.begin() + 2 * kWidth, kWidth, -INFINITY);
  const std::vector<TopLogits> got = rank(values, kWidth, {1, 0, 1, 1, 0});
  EXPECT_EQ(got[0].broken, 700);
  EXPECT_EQ(got[1].broken, 5);
  EXPECT_EQ(got[2].broken, -1);
  EXPECT_EQ(got[2].count, 0);
  EXPECT_EQ(got[3].count, TopLogits::kMost);
  EXPECT_EQ(got[4].count, 1);
  EXPECT_EQ(got[4].token[0], 0);
}

INSTANTIATE_TEST_SUITE_P(Columns, TopLogitsTest, ::testing::ValuesIn(kernel_backends()),
                         backend_id);

TEST(TopLogits, RefusesWhatCannotWork) {
  const Backend backend = open("reference");
  EXPECT_THAT(message_of(top_logits(backend, {.rows = -1, .vocabulary = 5}, {})),
              HasSubstr("-1 rows"));
  EXPECT_THAT(message_of(top_logits(backend, {.rows = 1, .vocabulary = 0}, {})), HasSubstr("of 0"));
  EXPECT_THAT(message_of(top_logits(backend, {.rows = 1, .vocabulary = 5}, {})),
              HasSubstr("logits is null"));
  EXPECT_TRUE(top_logits(backend, {.rows = 0, .vocabulary = 5}, {}).ok());
}

}  // namespace
}  // namespace infllm::testing
