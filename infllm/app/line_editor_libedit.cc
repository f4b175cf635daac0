// SPDX-License-Identifier: Apache-2.0
//
// Compiled where libedit is installed. It edits characters, not bytes, in a UTF-8 locale.
#include <editline/readline.h>
#include <langinfo.h>
#include <unistd.h>

#include <clocale>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "infllm/app/line_editor.h"
#include "infllm/app/signals.h"

namespace infllm::app {
namespace {

bool prepare() {
  if (isatty(STDIN_FILENO) != 1 || isatty(STDERR_FILENO) != 1) return false;
  if (std::strcmp(nl_langinfo(CODESET), "UTF-8") != 0) std::setlocale(LC_CTYPE, "C.UTF-8");
  static char name[] = "infllm";
  rl_readline_name = name;
  rl_outstream = stderr;  // stdout is for answers
  return rl_initialize() == 0;
}

}  // namespace

std::optional<std::string> read_line(const std::string& prompt) {
  static const bool is_ready = prepare();
  if (!is_ready) return read_plain_line(prompt);
  const bool was_up = interrupted();
  const std::unique_ptr<char, decltype(&std::free)> line(readline(prompt.c_str()), &std::free);
  if (line == nullptr || (interrupted() && !was_up)) return std::nullopt;
  if (*line != '\0') add_history(line.get());
  return std::string(line.get());
}

}  // namespace infllm::app
