// SPDX-License-Identifier: Apache-2.0
#include <clocale>
#include <cstdio>

#include "infllm/app/cli.h"
#include "infllm/app/commands.h"
#include "infllm/app/report.h"
#include "infllm/app/signals.h"

namespace infllm::app {
namespace {

int run(const Options& options) {
  switch (options.command) {
    case Command::kRun:
      return run_command(options);
    case Command::kChat:
      return chat_command(options);
    case Command::kBench:
      return bench_command(options);
    case Command::kInspect:
      return inspect_command(options);
    case Command::kTokenize:
      return tokenize_command(options);
    case Command::kEval:
      return eval_command(options);
    case Command::kNone:
      break;
  }
  return kExitUsage;
}

}  // namespace
}  // namespace infllm::app

int main(int argc, char** argv) {
  using namespace infllm::app;
  std::setlocale(LC_CTYPE, "");  // line editing counts characters; numbers stay as they are
  install_signal_handlers();
  const Parsed parsed = parse_command_line(argc, argv);
  if (parsed.exit_code == kExitOk) {
    const infllm::Status written = write_stdout(parsed.text);
    return written.ok() ? kExitOk : report_failure(written);
  }
  if (parsed.exit_code) {
    std::fputs(parsed.text.c_str(), stderr);
    return *parsed.exit_code;
  }
  return run(parsed.options);
}
