// SPDX-License-Identifier: Apache-2.0
//
// What every benchmark shares: timing with warm-up, and one JSON line a result.
//
//   Timing t = measure({.warmup = 1, .repetitions = 5}, [&] { run(); });
//   Json line = result_line("attend.forward", backend.name);
//   line["shape"] = {{"tokens", 32768}};
//   add_timing(line, t);
//   append_line(path, line);
//
// ms is the median, ms_low and ms_high the quartiles. The fields are described in
// bench/results/README.md.
#pragma once

#include <chrono>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "infllm/core/status.h"
#include "infllm/ops/backend.h"

namespace infllm::bench {

using Json = nlohmann::ordered_json;

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

// name, backend, device, commit and date. The commit is that of the sources in the current
// directory, with "+" when they differ from it.
Json result_line(std::string_view name, std::string_view backend);
// The same, and of a device its own name and its driver.
Json result_line(std::string_view name, const Backend& backend);
void add_timing(Json& line, const Timing& timing);
// A peer that ran in the same process, and peer_ms / ms.
void add_peer(Json& line, std::string_view peer, const Timing& timing);

// Nothing happens when path is empty.
Status append_line(const std::string& path, const Json& line);

}  // namespace infllm::bench
