// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/generation_config.h"

#include <gtest/gtest.h>

namespace infllm::engine {
namespace {

TEST(GenerationConfig, FollowsTheFile) {
  const GenerationConfig drawn =
      parse_generation_config(
          R"({"do_sample": true, "temperature": 0.8, "top_p": 0.8, "top_k": null})")
          .value();
  EXPECT_FLOAT_EQ(drawn.sampling.temperature, 0.8f);
  EXPECT_FLOAT_EQ(drawn.sampling.top_p, 0.8f);
  EXPECT_EQ(drawn.sampling.top_k, 0);
  const GenerationConfig fixed =
      parse_generation_config(R"({"do_sample": false, "temperature": 0.8, "max_new_tokens": 64})")
          .value();
  EXPECT_EQ(fixed.sampling.temperature, 0);
  EXPECT_EQ(fixed.max_new_tokens, 64);
  for (const char* bad :
       {R"({"do_sample": true, "top_p": "high"})", R"({"do_sample": true, "temperature": -1})",
        R"({"max_new_tokens": 1e300})", "[]", "{"}) {
    EXPECT_EQ(parse_generation_config(bad).status().code(), StatusCode::kDataError) << bad;
  }
}

}  // namespace
}  // namespace infllm::engine
