// SPDX-License-Identifier: Apache-2.0
//
// A fixed set of threads and one verb. Work is cut into tasks by the problem's shape alone, never
// by the number of threads, and a task writes only its own outputs: results are bitwise the same
// with one thread and with sixty-four.
//
//   ThreadPool pool(8);
//   pool.parallel_for(num_tiles, [&](std::int64_t tile, int worker) { ... scratch[worker] ... });
//
// Idle workers spin for some microseconds, because the layers of a decode step follow each other at
// once, and then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

namespace infllm {

class ThreadPool {
 public:
  // `threads` counts the caller, which works too; 0 means one per hardware thread.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  // Calls body(task, worker) once for every task in [0, tasks) and returns when all are done.
  // Tasks start in ascending order; put the long ones first. worker is in [0, size()). The body
  // must not throw and must not call parallel_for of the same pool. One caller at a time.
  template <typename Body>
  void parallel_for(std::int64_t tasks, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run(tasks, const_cast<void*>(static_cast<const void*>(&body)),
        [](void* context, std::int64_t task, int worker) {
          (*static_cast<Plain*>(context))(task, worker);
        });
  }

 private:
  using Invoke = void (*)(void* context, std::int64_t task, int worker);
  struct Shared;

  void run(std::int64_t tasks, void* context, Invoke invoke);

  int size_;
  std::unique_ptr<Shared> shared_;
};

}  // namespace infllm
