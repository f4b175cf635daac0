// SPDX-License-Identifier: Apache-2.0
#include "infllm/model/rope.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "infllm/backend/open.h"
#include "infllm/model/config.h"
#include "tests/support/source_folder.h"

namespace infllm::model {
namespace {

TEST(Rope, TablesFollowTheFormula) {
  RopeConfig config{.type = RopeType::kLongRope, .original_max_positions = 100};
  config.short_factor = {1.0f, 1.5f};
  config.long_factor = {2.0f, 4.0f};
  const Rope rope(config, 4, 100);
  EXPECT_EQ(rope.switch_length(), 100);
  EXPECT_EQ(rope.attention_factor(), 1.0f);
  float cos[2];
  float sin[2];
  rope.row(30, 100, cos, sin);
  EXPECT_FLOAT_EQ(cos[1], std::cos(30.0f * (1.0f / 1.5f) * 0.01f));
  rope.row(30, 101, cos, sin);
  EXPECT_FLOAT_EQ(cos[0], std::cos(30.0f / 2.0f));
  EXPECT_FLOAT_EQ(sin[1], std::sin(30.0f / 4.0f * 0.01f));
}

TEST(Rope, AttentionFactorGrowsWithTheStretch) {
  RopeConfig config{.type = RopeType::kLongRope, .factor = 0, .original_max_positions = 32768};
  config.short_factor = config.long_factor = {1.0f};
  EXPECT_FLOAT_EQ(Rope(config, 2, 32768).attention_factor(), 1);
  const double expected = std::sqrt(1 + std::log(4.0) / std::log(32768.0));
  EXPECT_FLOAT_EQ(Rope(config, 2, 131072).attention_factor(), static_cast<float>(expected));
  config.attention_factor = 1.0;
  EXPECT_FLOAT_EQ(Rope(config, 2, 131072).attention_factor(), 1) << "the override";
  EXPECT_EQ(Rope(config, 2, 131072).switch_length(), 0) << "both sets are the same";
}

// tests/golden/model/rope.json: every type, below and above the original length. Both sides round a
// handful of times in float32 on their way to a frequency.
TEST(Rope, FrequenciesAreThoseOfHuggingFace) {
  std::ifstream in(testing::source_folder() / "tests/golden/model/rope.json");
  const nlohmann::json cases = nlohmann::json::parse(in);
  ASSERT_GE(cases.size(), 12u);
  for (const nlohmann::json& c : cases) {
    const Result<ModelConfig> config = parse_config(c["config"].dump());
    ASSERT_TRUE(config.ok()) << config.status().message();
    const Rope rope(config->rope, config->head_dim, config->max_positions);
    const std::string what = c["config"]["rope_scaling"].dump();
    EXPECT_FLOAT_EQ(rope.attention_factor(), c["attention_factor"].get<float>()) << what;
    // At position 1 the angle is the frequency.
    std::vector<float> cos(static_cast<std::size_t>(config->head_dim / 2));
    std::vector<float> sin(cos.size());
    rope.row(1, c["length"].get<std::int32_t>(), cos.data(), sin.data());
    ASSERT_EQ(c["inverse_frequencies"].size(), cos.size());
    for (std::size_t i = 0; i < cos.size(); ++i) {
      const double expected = c["inverse_frequencies"][i].get<double>();
      EXPECT_NEAR(std::atan2(sin[i], cos[i]) / expected, 1,
                  8 * std::numeric_limits<float>::epsilon())
          << what << " dimension " << i;
    }
  }
}

// Every column fills the tables that the host fills; a device's double precision functions may
// round the last bit of a float another way.
TEST(Rope, EveryBackendFillsTheSameTables) {
  RopeConfig config{.type = RopeType::kLongRope, .factor = 0, .original_max_positions = 5000};
  for (int i = 0; i < 32; ++i) {
    config.short_factor.push_back(1 + 0.01f * static_cast<float>(i));
    config.long_factor.push_back(1 + 0.3f * static_cast<float>(i));
  }
  const Rope rope(config, 64, 20000);
  const std::vector<std::int32_t> positions = {0, 1, 4998, 4999, 5000, 123'456, 999'999};
  const std::vector<std::int32_t> lengths = {1, 5001, 4999, 5000, 5001, 200'000, 1'000'000};
  const std::size_t count = positions.size() * 32;
  for (const std::string& name : available_backends()) {
    const Backend backend = open_backend(name, {.threads = 2}).value();
    const auto up = [&](const auto& values) {
      const std::size_t bytes = values.size() * sizeof(values[0]);
      Buffer buffer = allocate(backend, bytes).value();
      EXPECT_TRUE(copy_in(backend, buffer.data(), values.data(), bytes).ok());
      return buffer;
    };
    const Buffer numbers = up(rope.numbers());
    const Buffer at = up(positions);
    const Buffer of = up(lengths);
    const std::vector<float> nan(count, NAN);
    const Buffer cos = up(nan);
    const Buffer sin = up(nan);
    for (const bool with_lengths : {true, false}) {
      RopeTableParams params = rope.tables(numbers.as<float>());
      params.tokens = std::ssize(positions);
      params.positions = at.as<std::int32_t>();
      params.lengths = with_lengths ? of.as<std::int32_t>() : nullptr;
      params.cos = cos.as<float>();
      params.sin = sin.as<float>();
      const Status status = rope_tables(backend, params);
      ASSERT_TRUE(status.ok()) << status.message();
      std::vector<float> got_cos(count);
      std::vector<float> got_sin(count);
      EXPECT_TRUE(copy_out(backend, got_cos.data(), cos.data(), cos.bytes()).ok());
      EXPECT_TRUE(copy_out(backend, got_sin.data(), sin.data(), sin.bytes()).ok());
      for (std::size_t t = 0; t < positions.size(); ++t) {
        float want_cos[32];
        float want_sin[32];
        rope.row(positions[t], with_lengths ? lengths[t] : positions[t] + 1, want_cos, want_sin);
        for (std::size_t i = 0; i < 32; ++i) {
          EXPECT_FLOAT_EQ(got_cos[t * 32 + i], want_cos[i]) << name << " token " << t;
          EXPECT_FLOAT_EQ(got_sin[t * 32 + i], want_sin[i]) << name << " token " << t;
        }
      }
    }
  }
}

}  // namespace
}  // namespace infllm::model
