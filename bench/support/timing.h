// SPDX-License-Identifier: Apache-2.0
//
// Repeated measurements of one thing, in seconds.
#pragma once

#include <utility>
#include <vector>

namespace infllm::bench {

double now_seconds();  // monotonic

struct Timing {
  double median = 0;  // seconds
  double low = 0;     // lower quartile
  double high = 0;    // upper quartile

  // Parts that ran one after the other.
  Timing& operator+=(const Timing& other);
  Timing operator*(double factor) const;
};

Timing summarise(std::vector<double> seconds);

struct Repeat {
  int warmup = 1;
  int repetitions = 3;
};

template <typename Body>
Timing measure(const Repeat& repeat, Body&& body) {
  for (int i = 0; i < repeat.warmup; ++i) body();
  std::vector<double> seconds;
  for (int i = 0; i < repeat.repetitions; ++i) {
    const double start = now_seconds();
    body();
    seconds.push_back(now_seconds() - start);
  }
  return summarise(std::move(seconds));
}

}  // namespace infllm::bench
