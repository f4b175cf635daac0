// SPDX-License-Identifier: Apache-2.0
#include "infllm/core/status.h"

#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "infllm/core/arena.h"

namespace infllm {
namespace {

TEST(StatusTest, OkIsEmpty) {
  const Status ok;
  EXPECT_TRUE(ok.ok());
  EXPECT_EQ(ok.code(), StatusCode::kOk);
  EXPECT_EQ(ok.message(), "");
  EXPECT_TRUE(ok.with_context("anything").ok());
}

TEST(StatusTest, AnErrorKeepsItsCodeThroughContexts) {
  const Status error = not_found("no tensor \"x\"").with_context("a.safetensors");
  EXPECT_EQ(error.code(), StatusCode::kNotFound);
  EXPECT_EQ(error.message(), "a.safetensors: no tensor \"x\"");
  EXPECT_EQ(invalid_argument("m").code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(data_error("m").code(), StatusCode::kDataError);
  EXPECT_EQ(unsupported("m").code(), StatusCode::kUnsupported);
  EXPECT_EQ(resource_exhausted("m").code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(cancelled("m").code(), StatusCode::kCancelled);
  EXPECT_EQ(io_error("m").code(), StatusCode::kIoError);
}

Result<std::unique_ptr<int>> positive(int value) {
  if (value <= 0) return invalid_argument("not positive");
  return std::make_unique<int>(value);
}

Result<int> doubled(int value) {
  const std::unique_ptr<int> number = INFLLM_TRY(positive(value));
  return 2 * *number;
}

Status check_all(int a, int b) {
  INFLLM_TRY(positive(a));
  INFLLM_TRY(positive(b).status().with_context("b"));
  return {};
}

TEST(StatusTest, TryYieldsTheValueOrForwardsTheError) {
  EXPECT_EQ(doubled(4).value(), 8);
  EXPECT_EQ(doubled(-4).status().message(), "not positive");
  EXPECT_TRUE(check_all(1, 2).ok());
  EXPECT_EQ(check_all(0, 2).message(), "not positive");
  EXPECT_EQ(check_all(1, 0).message(), "b: not positive");
}

TEST(StatusDeathTest, OurOwnMistakesAbortWithAPlace) {
  EXPECT_DEATH(doubled(-1).value(), "not positive");
  EXPECT_DEATH(INFLLM_CHECK(1 > 2, "numbers"),
               "status_test.cc:[0-9]+: check failed: 1 > 2: numbers");
  EXPECT_DEATH(Result<int>{Status()}, "empty Result");
}

TEST(ArenaTest, HandsOutWhatTheSizeSaid) {
  ArenaSize size;
  size.take<char>(3);
  size.take<double>(5);
  size.add(7);
  std::vector<std::byte> memory(size.bytes() + 1);
  Arena arena(std::span<std::byte>(memory).subspan(1));  // from any alignment
  for (void* pointer :
       {static_cast<void*>(arena.take<char>(3)), static_cast<void*>(arena.take<double>(5)),
        static_cast<void*>(arena.take<char>(7))}) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(pointer) % kArenaAlignment, 0u);
  }
  EXPECT_LT(arena.rest().size(), kArenaAlignment);
  EXPECT_EQ(ArenaSize().bytes(), 0u);
  Arena nothing({});
  EXPECT_TRUE(nothing.rest().empty());
  nothing.take<double>(0);
}

TEST(ArenaDeathTest, RunningOutAborts) {
  std::vector<std::byte> memory(256);
  EXPECT_DEATH(Arena(memory).take<double>(1000), "workspace too small");
}

}  // namespace
}  // namespace infllm
