// SPDX-License-Identifier: Apache-2.0
//
// One line of progress on stderr: how far, how fast, how long yet.
//
//   Progress bar("prefill", Progress::Unit::kTokens, prompt_tokens);
//   bar.update(512); ... bar.update(1024); ...
//   bar.finish();                                      // the destructor does it too
//
//   prefill [=========>               ]  36%  12288/33792 tokens  1843 tokens/s  ETA 12 s
//
// On a terminal the line is redrawn in place, at most ten times a second, and erased at the end.
// Elsewhere (a file, a pipe, TERM=dumb) a plain line appears every ten seconds, so short work is
// silent. NO_COLOR keeps the bar and drops its colour.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

namespace infllm::app {

class Progress {
 public:
  enum class Unit { kTokens, kBytes, kItems };

  Progress(std::string_view label, Unit unit, std::int64_t total, bool enabled = true);
  ~Progress() { finish(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // `done` of the total; `note` stands at the end of the line.
  void update(std::int64_t done, std::string_view note = {});
  void finish();

 private:
  using Clock = std::chrono::steady_clock;
  void draw(std::int64_t done, double seconds, std::string_view note);

  std::string label_;
  Unit unit_;
  std::int64_t total_;
  bool enabled_;
  bool terminal_;
  bool drawn_ = false;
  std::int64_t first_ = -1;  // what was done already at the first update: no part of the rate
  Clock::time_point start_;
  Clock::time_point last_;
};

// "1 h 02 min", "3 min 20 s", "12 s".
std::string duration_text(double seconds);
// "868 MB", "16.4 GB".
std::string bytes_text(double bytes);

}  // namespace infllm::app
