// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

namespace infllm::engine {
namespace {

std::vector<Pending> random_load(std::mt19937& random) {
  std::vector<Pending> running(random() % 20);
  for (Pending& sequence : running) {
    sequence.cached = static_cast<std::int32_t>(random() % 5000);
    sequence.uncached = random() % 3 == 0 ? 1 : 1 + static_cast<std::int32_t>(random() % 3000);
  }
  return running;
}

TEST(Scheduler, KeepsItsPromises) {
  for (std::uint32_t seed = 0; seed < 5000; ++seed) {
    std::mt19937 random(seed);
    const std::vector<Pending> running = random_load(random);
    const SchedulerOptions options{.chunk_tokens = 1 + static_cast<std::int32_t>(random() % 1500),
                                   .block_size = random() % 2 == 0 ? 64 : 16};
    const std::vector<std::int32_t> tokens = schedule(running, options);
    ASSERT_EQ(tokens.size(), running.size());
    std::int32_t prompt_tokens = 0;
    bool is_oldest_prompt = true;
    for (std::size_t i = 0; i < running.size(); ++i) {
      ASSERT_GE(tokens[i], 0);
      ASSERT_LE(tokens[i], running[i].uncached);
      if (running[i].uncached == 1) {
        ASSERT_EQ(tokens[i], 1) << "a decode was left out, seed " << seed;
        continue;
      }
      prompt_tokens += tokens[i];
      if (is_oldest_prompt) {
        ASSERT_GT(tokens[i], 0) << "the oldest prompt stands, seed " << seed;
      }
      is_oldest_prompt = false;
      // An unfinished chunk that could have ended at a border did.
      const std::int32_t end = running[i].cached + tokens[i];
      if (tokens[i] > 0 && tokens[i] < running[i].uncached && end % options.block_size != 0) {
        ASSERT_EQ((end - 1) / options.block_size, running[i].cached / options.block_size)
            << "a border was passed over, seed " << seed;
      }
    }
    ASSERT_LE(prompt_tokens, options.chunk_tokens) << "seed " << seed;
  }
}

TEST(Scheduler, OneLongPromptGetsTheWholeChunk) {
  EXPECT_EQ(schedule(std::vector<Pending>{{0, 10000}}, {}), std::vector<std::int32_t>{512});
}

TEST(Scheduler, ShortPromptIsNotHeldUpByALongOne) {
  const std::vector<Pending> running = {{0, 100000}, {0, 100}};
  EXPECT_EQ(schedule(running, {}), (std::vector<std::int32_t>{384, 100}));
}

TEST(Scheduler, ManyPromptsShareEvenly) {
  const std::vector<Pending> running(4, Pending{0, 1000});
  EXPECT_EQ(schedule(running, {}), (std::vector<std::int32_t>{128, 128, 128, 128}));
}

// Simulates to the end: everybody finishes, and nobody waits longer than the work in front of him.
TEST(Scheduler, NobodyStarves) {
  for (std::uint32_t seed = 0; seed < 200; ++seed) {
    std::mt19937 random(seed);
    std::vector<Pending> running = random_load(random);
    const SchedulerOptions options{.chunk_tokens = 256};
    std::int64_t work = 0;
    for (const Pending& sequence : running) work += sequence.uncached;
    std::int64_t steps = 0;
    while (!running.empty()) {
      const std::vector<std::int32_t> tokens = schedule(running, options);
      for (std::size_t i = 0; i < running.size(); ++i) {
        running[i].cached += tokens[i];
        running[i].uncached -= tokens[i];
      }
      std::erase_if(running, [](const Pending& sequence) { return sequence.uncached == 0; });
      ++steps;
    }
    // Each step but the last computes at least a block's worth of what is left, or a prompt's end.
    EXPECT_LE(steps, work / 64 + 21) << "seed " << seed;
  }
}

}  // namespace
}  // namespace infllm::engine
