// SPDX-License-Identifier: Apache-2.0
#include "infllm/core/parallel.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace infllm {
namespace {

class ThreadPoolTest : public ::testing::TestWithParam<int> {};

TEST_P(ThreadPoolTest, RunsEveryTaskOnce) {
  ThreadPool pool(GetParam());
  EXPECT_EQ(pool.size(), GetParam());
  for (const std::int64_t tasks : {0, 1, 2, 7, 8, 9, 1000}) {
    std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
    pool.parallel_for(tasks, [&](std::int64_t task, int worker) {
      EXPECT_GE(worker, 0);
      EXPECT_LT(worker, pool.size());
      runs[static_cast<std::size_t>(task)].fetch_add(1);
    });
    for (const auto& count : runs) ASSERT_EQ(count.load(), 1);
  }
}

// Workers have scratch memory of their own: no two tasks run as the same worker at once.
TEST_P(ThreadPoolTest, AWorkerRunsOneTaskAtATime) {
  ThreadPool pool(GetParam());
  std::vector<std::atomic<bool>> busy(static_cast<std::size_t>(pool.size()));
  pool.parallel_for(500, [&](std::int64_t, int worker) {
    ASSERT_FALSE(busy[static_cast<std::size_t>(worker)].exchange(true));
    std::this_thread::yield();
    busy[static_cast<std::size_t>(worker)] = false;
  });
}

// The layers of a decode step: thousands of small loops one after another, each of which sees what
// the last one wrote. Plain ints, so that ThreadSanitizer sees a missing barrier.
TEST_P(ThreadPoolTest, ManySmallLoopsFollowEachOther) {
  ThreadPool pool(GetParam());
  constexpr std::int64_t kTasks = 5;
  std::vector<int> values(kTasks, 0);
  std::vector<int> sums(kTasks, 0);
  for (int round = 0; round < 2000; ++round) {
    pool.parallel_for(kTasks, [&](std::int64_t task, int) {
      const auto i = static_cast<std::size_t>(task);
      sums[i] = values[i] + values[(i + 1) % kTasks];
    });
    pool.parallel_for(kTasks, [&](std::int64_t task, int) {
      const auto i = static_cast<std::size_t>(task);
      values[i] = sums[(i + 2) % kTasks] / 2 + 1;
    });
    for (const int value : values) ASSERT_EQ(value, round + 1);
  }
}

// Workers that fell asleep wake up again.
TEST_P(ThreadPoolTest, WakesAfterAPause) {
  ThreadPool pool(GetParam());
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::atomic<int> sum = 0;
    pool.parallel_for(16, [&](std::int64_t task, int) { sum += static_cast<int>(task); });
    ASSERT_EQ(sum.load(), 120);
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, ThreadPoolTest, ::testing::Range(1, 9));

TEST(ThreadPool, ComesAndGoes) {
  for (int i = 0; i < 200; ++i) {
    ThreadPool pool(i % 8 + 1);
    if (i % 2 == 0) pool.parallel_for(3, [](std::int64_t, int) {});
  }
}

TEST(ThreadPool, ZeroMeansOnePerHardwareThread) {
  EXPECT_EQ(ThreadPool(0).size(),
            std::max(1, static_cast<int>(std::thread::hardware_concurrency())));
}

}  // namespace
}  // namespace infllm
