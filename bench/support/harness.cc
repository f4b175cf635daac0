// SPDX-License-Identifier: Apache-2.0
#include "bench/support/harness.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <memory>

namespace infllm::bench {
namespace {

// First line that a command prints; empty when it fails.
std::string first_line_of(const char* command) {
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command, "r"), &pclose);
  char line[256] = "";
  if (pipe == nullptr || std::fgets(line, sizeof line, pipe.get()) == nullptr) return "";
  line[std::strcspn(line, "\n")] = '\0';
  return line;
}

// $INFLLM_COMMIT, for a copy of the tree without its repository; else what git says.
std::string commit() {
  if (const char* named = std::getenv("INFLLM_COMMIT"); named != nullptr) return named;
  const std::string hash = first_line_of("git rev-parse --short HEAD 2>/dev/null");
  const bool dirty =
      !first_line_of("git status --porcelain --untracked-files=no 2>/dev/null").empty();
  return hash + (dirty ? "+" : "");
}

std::string processor() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    const std::size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) {
      return line.substr(colon + 2);
    }
  }
  return "unknown processor";
}

// "580.159.04": the first word with dots in what the kernel module says of itself.
std::string driver() {
  std::ifstream version("/proc/driver/nvidia/version");
  for (std::string word; version >> word;) {
    const bool is_version = word.find_first_not_of("0123456789.") == std::string::npos;
    if (is_version && word.find('.') != std::string::npos) return word;
  }
  return "";
}

double milliseconds(double seconds) { return std::round(seconds * 1e8) / 1e5; }

}  // namespace

double now_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Timing& Timing::operator+=(const Timing& other) {
  median += other.median;
  low += other.low;
  high += other.high;
  return *this;
}

Timing Timing::operator*(double factor) const {
  return {median * factor, low * factor, high * factor};
}

Timing summarise(std::vector<double> seconds) {
  if (seconds.empty()) return {};
  std::sort(seconds.begin(), seconds.end());
  const std::size_t n = seconds.size();
  return {(seconds[(n - 1) / 2] + seconds[n / 2]) / 2, seconds[n / 4], seconds[3 * n / 4]};
}

Json result_line(std::string_view name, std::string_view backend) {
  static const std::string device = processor();
  static const std::string revision = commit();
  return {{"name", name},
          {"backend", backend},
          {"device", device},
          {"commit", revision},
          {"date", fmt::format("{:%Y-%m-%d}", fmt::gmtime(std::time(nullptr)))}};
}

Json result_line(std::string_view name, const Backend& backend) {
  static const std::string version = driver();
  Json line = result_line(name, backend.name);
  const Result<DeviceInfo> info = device_info(backend);
  if (!info.ok() || info->name.empty()) return line;
  line["device"] = info->name;
  if (!version.empty()) line["driver"] = version;
  return line;
}

void add_timing(Json& line, const Timing& timing) {
  line["ms"] = milliseconds(timing.median);
  line["ms_low"] = milliseconds(timing.low);
  line["ms_high"] = milliseconds(timing.high);
}

void add_peer(Json& line, std::string_view peer, const Timing& timing) {
  line["peer"] = peer;
  line["peer_ms"] = milliseconds(timing.median);
  line["ratio"] = std::round(timing.median * 1e3 / line["ms"].get<double>() * 1e3) / 1e3;
}

Status append_line(const std::string& path, const Json& line) {
  if (path.empty()) return {};
  std::ofstream file(path, std::ios::app);
  file << line.dump() << '\n';
  if (file.flush()) return {};
  return io_error(fmt::format("cannot append to {}: {}", path, std::strerror(errno)));
}

}  // namespace infllm::bench
