// SPDX-License-Identifier: Apache-2.0
#include "infllm/core/parallel.h"

#include <algorithm>
#include <chrono>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace infllm {
namespace {

constexpr auto kSpin = std::chrono::microseconds(60);

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Waits until `value` differs from `seen`: spins first, then sleeps.
std::uint32_t wait_for_change(const std::atomic<std::uint32_t>& value, std::uint32_t seen) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  for (;;) {
    for (int i = 0; i < 64; ++i) {
      const std::uint32_t now = value.load(std::memory_order_acquire);
      if (now != seen) return now;
      relax();
    }
    if (std::chrono::steady_clock::now() >= deadline) break;
  }
  value.wait(seen, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

}  // namespace

struct ThreadPool::Shared {
  alignas(64) std::atomic<std::uint32_t> generation{0};  // one more per parallel_for
  alignas(64) std::atomic<std::int64_t> next_task{0};
  alignas(64) std::atomic<std::uint32_t> finished{0};  // workers done with this generation
  std::int64_t tasks = 0;
  void* context = nullptr;
  Invoke invoke = nullptr;
  bool stopping = false;
  std::vector<std::jthread> workers;

  void drain(int worker) {
    for (;;) {
      const std::int64_t task = next_task.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      invoke(context, task, worker);
    }
  }
};

ThreadPool::ThreadPool(int threads)
    : size_(threads > 0 ? threads
                        : std::max(1, static_cast<int>(std::thread::hardware_concurrency()))),
      shared_(std::make_unique<Shared>()) {
  for (int worker = 1; worker < size_; ++worker) {
    shared_->workers.emplace_back([shared = shared_.get(), worker] {
      std::uint32_t seen = 0;
      for (;;) {
        seen = wait_for_change(shared->generation, seen);
        if (shared->stopping) return;
        shared->drain(worker);
        shared->finished.fetch_add(1, std::memory_order_release);
        shared->finished.notify_one();
      }
    });
  }
}

ThreadPool::~ThreadPool() {
  shared_->stopping = true;
  shared_->generation.fetch_add(1, std::memory_order_release);
  shared_->generation.notify_all();
}

void ThreadPool::run(std::int64_t tasks, void* context, Invoke invoke) {
  if (tasks <= 0) return;
  if (size_ == 1 || tasks == 1) {
    for (std::int64_t task = 0; task < tasks; ++task) invoke(context, task, 0);
    return;
  }
  Shared& shared = *shared_;
  shared.tasks = tasks;
  shared.context = context;
  shared.invoke = invoke;
  shared.next_task.store(0, std::memory_order_relaxed);
  shared.finished.store(0, std::memory_order_relaxed);
  shared.generation.fetch_add(1, std::memory_order_release);
  shared.generation.notify_all();
  shared.drain(0);
  const auto others = static_cast<std::uint32_t>(size_ - 1);
  for (std::uint32_t done = shared.finished.load(std::memory_order_acquire); done != others;) {
    done = wait_for_change(shared.finished, done);
  }
}

}  // namespace infllm
