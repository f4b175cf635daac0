// SPDX-License-Identifier: Apache-2.0
//
// From argv to Options. Precedence: command line, environment (INFLLM_DEVICE, ...), --config file,
// checkpoint, default.
#pragma once

#include <optional>
#include <string>

#include "infllm/app/options.h"

namespace infllm::app {

struct Parsed {
  Options options;
  std::optional<int> exit_code;  // set: nothing to run (help, version, usage error)
  std::string text;              // to stdout when exit_code is 0, else to stderr
};

Parsed parse_command_line(int argc, char** argv);

// What --help prints; one screen for each command. Empty name: the overview.
std::string help_text(const std::string& command);

}  // namespace infllm::app
