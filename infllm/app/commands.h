// SPDX-License-Identifier: Apache-2.0
//
// One function a command; each returns the program's exit code.
#pragma once

#include "infllm/app/options.h"

namespace infllm::app {

int run_command(const Options& options);
int chat_command(const Options& options);
int bench_command(const Options& options);
int inspect_command(const Options& options);
int tokenize_command(const Options& options);
int eval_command(const Options& options);

}  // namespace infllm::app
