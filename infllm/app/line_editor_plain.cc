// SPDX-License-Identifier: Apache-2.0
//
// Compiled where libedit is not installed.
#include "infllm/app/line_editor.h"

namespace infllm::app {

std::optional<std::string> read_line(const std::string& prompt) { return read_plain_line(prompt); }

}  // namespace infllm::app
