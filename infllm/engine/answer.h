// SPDX-License-Identifier: Apache-2.0
//
// The text side of one answer: tokens in, text out that is final. A piece is held back while it may
// be the beginning of a stop string or of a character.
//
//   Answer answer(tokenizer, {"\n\n"});
//   std::string text = answer.push(token);      // may be empty; may end the answer:
//   if (answer.stopped()) ...                   // text before the stop string has been returned
//   std::string rest = answer.finish();         // what was held back; "" after a stop string
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "infllm/engine/stop_strings.h"
#include "infllm/engine/tokenizer.h"

namespace infllm::engine {

class Answer {
 public:
  // Keeps a reference to `tokenizer`. `stop` has passed StopStrings::check().
  Answer(const Tokenizer& tokenizer, std::vector<std::string> stop)
      : decoder_(tokenizer), stop_(std::move(stop)) {}

  std::string push(std::int32_t token) { return stop_.push(decoder_.push(token)); }
  bool stopped() const { return stop_.stopped(); }
  std::string finish() {
    if (stopped()) return "";
    const std::string text = stop_.push(decoder_.finish());
    return stopped() ? text : text + stop_.finish();
  }

 private:
  TokenDecoder decoder_;
  StopStrings stop_;
};

}  // namespace infllm::engine
