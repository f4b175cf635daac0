// SPDX-License-Identifier: Apache-2.0
//
// Template text -> tokens, with white space handled as Hugging Face sets up Jinja: trim_blocks (the
// newline after a statement or comment goes), lstrip_blocks (blanks before one at the start of a
// line go), '-' and '+' at the tags, {% raw %}, and no newline at the very end.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "infllm/core/status.h"

namespace infllm::engine::jinja {

struct Token {
  enum class Kind {
    kText,
    kPrintBegin,  // {{
    kPrintEnd,
    kBlockBegin,  // {%
    kBlockEnd,
    kName,
    kString,
    kInteger,
    kFloat,
    kOperator,
    kEnd,
  };
  Kind kind;
  std::string text;  // of a string: what it means, escapes resolved
  int line;
};

// Ends with a kEnd token. kDataError names the line and the reason.
Result<std::vector<Token>> lex(std::string_view source);

// "chat template line 7: <reason>"
Status template_error(int line, std::string_view reason);

}  // namespace infllm::engine::jinja
