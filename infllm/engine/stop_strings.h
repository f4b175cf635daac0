// SPDX-License-Identifier: Apache-2.0
//
// Ends an answer at a stop string, while it streams. Text that may be the beginning of a stop
// string is held back until it is decided, so that no part of one is ever shown, and what was
// streamed equals what cutting the whole text at its first stop string gives: the first to be
// complete, and of those that end together the longest.
//
//   StopStrings stops({"\nUser:", "###"});
//   std::cout << stops.push("Well.\nUs");   // "Well."
//   std::cout << stops.push("er: hi");      // "", and stops.stopped() is true
//   std::cout << stops.finish();            // what was held back, when the answer ended otherwise
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "infllm/core/status.h"

namespace infllm::engine {

class StopStrings {
 public:
  static constexpr std::size_t kMaxStrings = 16;
  static constexpr std::size_t kMaxBytes = 1024;  // of one string

  // kInvalidArgument for an empty string, one too long, or too many.
  static Status check(const std::vector<std::string>& strings);

  // Strings that passed check(); an empty one would be ignored.
  explicit StopStrings(std::vector<std::string> strings) : strings_(std::move(strings)) {
    std::erase(strings_, "");
  }

  std::string push(std::string_view text);  // what may be shown
  std::string finish();
  bool stopped() const { return !found_.empty(); }
  // The stop string that ended the answer; empty when none did.
  const std::string& found() const { return found_; }

 private:
  std::vector<std::string> strings_;
  std::string held_;
  std::string found_;
};

}  // namespace infllm::engine
