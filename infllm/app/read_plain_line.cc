// SPDX-License-Identifier: Apache-2.0
#include <unistd.h>

#include <cstdio>

#include "infllm/app/line_editor.h"

namespace infllm::app {

std::optional<std::string> read_plain_line(const std::string& prompt) {
  if (isatty(STDIN_FILENO) == 1) {
    std::fputs(prompt.c_str(), stderr);
    std::fflush(stderr);
  }
  std::string line;
  for (;;) {
    const int c = std::getc(stdin);  // an interrupt ends it with EOF
    if (c == '\n') return line;
    if (c == EOF) break;
    line += static_cast<char>(c);
  }
  std::clearerr(stdin);
  if (line.empty()) return std::nullopt;
  return line;  // the last line may lack its line break
}

}  // namespace infllm::app
