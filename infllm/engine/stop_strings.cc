// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/stop_strings.h"

#include <fmt/format.h>

#include <algorithm>

namespace infllm::engine {

Status StopStrings::check(const std::vector<std::string>& strings) {
  if (strings.size() > kMaxStrings) {
    return invalid_argument(
        fmt::format("{} stop strings, expected at most {}", strings.size(), kMaxStrings));
  }
  for (const std::string& text : strings) {
    if (text.empty() || text.size() > kMaxBytes) {
      return invalid_argument(
          fmt::format("a stop string of {} bytes, expected 1 to {}", text.size(), kMaxBytes));
    }
  }
  return {};
}

std::string StopStrings::push(std::string_view text) {
  if (stopped()) return {};
  // Byte by byte, because the first string to be complete counts: with "abcd" and "bc", "abcd"
  // stops at "bc" however it is cut into pieces.
  std::string shown;
  for (const char c : text) {
    held_ += c;
    for (const std::string& stop : strings_) {
      if (!held_.ends_with(stop) || stop.size() < found_.size()) continue;
      found_ = stop;
    }
    if (stopped()) {
      held_.resize(held_.size() - found_.size());
      shown += held_;
      held_.clear();
      return shown;
    }
    // The longest end of the text that begins a stop string stays.
    std::size_t keep = 0;
    for (const std::string& stop : strings_) {
      const std::string_view begin(stop.data(), stop.size() - 1);
      for (std::size_t size = std::min(held_.size(), begin.size()); size > keep; --size) {
        if (held_.ends_with(begin.substr(0, size))) keep = size;
      }
    }
    shown.append(held_, 0, held_.size() - keep);
    held_.erase(0, held_.size() - keep);
  }
  return shown;
}

std::string StopStrings::finish() { return std::exchange(held_, {}); }

}  // namespace infllm::engine
