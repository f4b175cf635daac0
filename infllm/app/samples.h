// SPDX-License-Identifier: Apache-2.0
//
// Questions about documents, one JSON object a line:
//
//   {"id": "a7", "length": 4096, "document": "...",
//    "questions": [{"task": "single", "question": "...", "answer": "48213"}]}
//
// `id` may be missing or a number. `length` names the group that the document is counted in.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "infllm/core/status.h"

namespace infllm::app {

struct Question {
  std::string task;
  std::string question;
  std::string answer;
};

struct Sample {
  std::string id;
  std::int32_t length = 0;
  std::string document;
  std::vector<Question> questions;
};

// The first `limit` documents, 0: all. Messages name the line.
Result<std::vector<Sample>> read_samples(const std::string& path, std::int32_t limit);

}  // namespace infllm::app
