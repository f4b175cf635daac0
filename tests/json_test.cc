// SPDX-License-Identifier: Apache-2.0
#include "infllm/core/json.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

namespace infllm {
namespace {

using ::testing::HasSubstr;

const JsonLimits kLimits{
    .what = "config.json", .max_bytes = 1000, .max_depth = 8, .max_values = 20};

std::string refusal(std::string_view text) {
  const Result<nlohmann::json> result = parse_json(text, kLimits);
  EXPECT_FALSE(result.ok()) << text;
  EXPECT_EQ(result.status().code(), StatusCode::kDataError);
  return result.status().message();
}

TEST(JsonTest, ReadsWhatIsWellFormed) {
  const nlohmann::json json =
      parse_json(R"({"a": [1, 2.5, true, null], "b": {"a": "\u00e9"}})", kLimits).value();
  EXPECT_EQ(json["a"][1], 2.5);
  EXPECT_EQ(json["b"]["a"], "\xc3\xa9");
}

TEST(JsonTest, NamesTheDocumentAndTheByte) {
  EXPECT_EQ(refusal(R"({"a": })"), "config.json: not valid JSON at byte 7");
  for (const char* text : {"", "{", "[1,]", "{\"a\":1}x", "nul", "\"\xff\"", "[NaN]", "'a'"}) {
    EXPECT_THAT(refusal(text), HasSubstr("not valid JSON at byte"));
  }
}

TEST(JsonTest, MeasuresBeforeItBuilds) {
  const auto nested = [](std::size_t depth) {
    return std::string(depth, '[') + std::string(depth, ']');
  };
  EXPECT_TRUE(parse_json(nested(8), kLimits).ok());
  EXPECT_EQ(refusal(nested(9)), "config.json: nested deeper than 8 levels");
  EXPECT_THAT(parse_json(std::string(1'000'000, '['), {}).status().message(),
              HasSubstr("nested deeper than 64 levels"));
  EXPECT_EQ(refusal(std::string(1001, ' ')),
            "config.json: 1001 bytes of JSON, expected at most 1000");
  std::string many = "[0";
  for (int i = 0; i < 18; ++i) many += ",0";
  EXPECT_TRUE(parse_json(many + "]", kLimits).ok());
  EXPECT_EQ(refusal(many + ",0]"), "config.json: more than 20 values");
}

TEST(JsonTest, RefusesAKeyTwiceInOneObject) {
  EXPECT_EQ(refusal(R"({"a": 1, "b": {"a": 2}, "a": 3})"),
            "config.json: key \"a\" appears twice in one object");
  EXPECT_TRUE(parse_json(R"([{"a": 1}, {"a": 2}])", kLimits).ok());
}

}  // namespace
}  // namespace infllm
