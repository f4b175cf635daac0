// SPDX-License-Identifier: Apache-2.0
#include "infllm/app/progress.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "infllm/app/signals.h"

namespace infllm::app {
namespace {

constexpr auto kRedraw = std::chrono::milliseconds(100);
constexpr auto kPlainLine = std::chrono::seconds(10);
constexpr int kBarWidth = 25;

bool is_terminal() {
  const char* term = std::getenv("TERM");
  return isatty(STDERR_FILENO) == 1 && term != nullptr && std::string_view(term) != "dumb";
}

bool has_color() {
  const char* no_color = std::getenv("NO_COLOR");
  return no_color == nullptr || *no_color == '\0';
}

int terminal_columns() {
  winsize size{};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

std::string bar_text(double share) {
  const int filled = static_cast<int>(std::lround(share * kBarWidth));
  std::string bar(kBarWidth, ' ');
  for (int i = 0; i < filled; ++i) bar[i] = i + 1 == filled && filled < kBarWidth ? '>' : '=';
  return bar;
}

}  // namespace

std::string duration_text(double seconds) {
  const auto whole = static_cast<std::int64_t>(std::max(0.0, std::ceil(seconds)));
  if (whole >= 3600) return fmt::format("{} h {:02} min", whole / 3600, whole / 60 % 60);
  if (whole >= 60) return fmt::format("{} min {:02} s", whole / 60, whole % 60);
  return fmt::format("{} s", whole);
}

std::string bytes_text(double bytes) {
  if (bytes >= 1e9) return fmt::format("{:.2f} GB", bytes / 1e9);
  if (bytes >= 1e6) return fmt::format("{:.1f} MB", bytes / 1e6);
  if (bytes >= 1e3) return fmt::format("{:.1f} kB", bytes / 1e3);
  return fmt::format("{:.0f} B", bytes);
}

Progress::Progress(std::string_view label, Unit unit, std::int64_t total, bool enabled)
    : label_(label),
      unit_(unit),
      total_(total),
      enabled_(enabled && total > 0),
      terminal_(is_terminal()),
      start_(Clock::now()),
      last_(start_) {}

void Progress::update(std::int64_t done, std::string_view note) {
  if (!enabled_) return;
  if (first_ < 0) first_ = done;
  const Clock::time_point now = Clock::now();
  if (now - last_ < (terminal_ ? Clock::duration(kRedraw) : Clock::duration(kPlainLine))) return;
  last_ = now;
  draw(std::min(done, total_), std::chrono::duration<double>(now - start_).count(), note);
}

void Progress::draw(std::int64_t done, double seconds, std::string_view note) {
  const double rate = seconds > 0 ? static_cast<double>(done - first_) / seconds : 0;
  std::string counts;
  switch (unit_) {
    case Unit::kTokens:
      counts = fmt::format("{}/{} tokens  {:.0f} tokens/s", done, total_, rate);
      break;
    case Unit::kBytes:
      counts = fmt::format("{}/{}  {:.2f} GB/s", bytes_text(static_cast<double>(done)),
                           bytes_text(static_cast<double>(total_)), rate / 1e9);
      break;
    case Unit::kItems:
      counts = fmt::format("{}/{}", done, total_);
      break;
  }
  const std::string eta =
      rate > 0 ? "ETA " + duration_text(static_cast<double>(total_ - done) / rate) : "";
  const double share = static_cast<double>(done) / static_cast<double>(total_);
  if (!terminal_) {
    fmt::print(stderr, "{}: {:.0f}%  {}  {}  {}\n", label_, 100 * share, counts, eta, note);
    return;
  }
  hide_cursor();
  drawn_ = true;
  std::string line = fmt::format("{} [{}] {:3.0f}%  {}  {}  {}", label_, bar_text(share),
                                 100 * share, counts, eta, note);
  line.resize(std::min<std::size_t>(line.size(), terminal_columns() - 1));
  if (has_color()) line = "\x1b[36m" + line + "\x1b[0m";
  fmt::print(stderr, "\r\x1b[K{}", line);
  std::fflush(stderr);
}

void Progress::finish() {
  if (drawn_) {
    fmt::print(stderr, "\r\x1b[K");
    std::fflush(stderr);
    show_cursor();
    drawn_ = false;
  }
  enabled_ = false;
}

}  // namespace infllm::app
