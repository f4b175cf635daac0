// SPDX-License-Identifier: Apache-2.0
//
// One line from the user: with editing and history where libedit is installed and both ends are a
// terminal, else as it comes. line_editor_libedit.cc or line_editor_plain.cc is compiled.
#pragma once

#include <optional>
#include <string>

namespace infllm::app {

// The next line without its line break; nothing at the end of input or when an interrupt comes
// while it waits: interrupted() is up then. An interrupt that came before changes nothing. `prompt`
// goes to stderr, and only to a terminal.
std::optional<std::string> read_line(const std::string& prompt);

// The same without editing.
std::optional<std::string> read_plain_line(const std::string& prompt);

}  // namespace infllm::app
