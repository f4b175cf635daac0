// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "infllm/app/commands.h"
#include "infllm/app/progress.h"
#include "infllm/app/prompt.h"
#include "infllm/app/report.h"
#include "infllm/app/sampling.h"
#include "infllm/app/signals.h"

namespace infllm::app {
namespace {

// The text is read before the model, so that a missing file is told at once.
Result<engine::Completion> answer(const Options& options, std::unique_ptr<Session>& session) {
  const std::string message = INFLLM_TRY(read_message(options.prompt));
  session = INFLLM_TRY(open_session(options.model));
  print_effective_values(*session, options.model, context_tokens(*session, options.model));
  const Prompter prompter = INFLLM_TRY(Prompter::create(*session, options.prompt));

  engine::Request request = INFLLM_TRY(base_request(*session, options));
  request.prompt = options.prompt.chat ? INFLLM_TRY(prompter.ask(message)) : prompter.raw(message);
  const auto length = static_cast<std::int32_t>(request.prompt.size());
  const std::int32_t context = request.max_tokens > 0 ? length + request.max_tokens : 0;
  const std::unique_ptr<engine::Engine> engine =
      INFLLM_TRY(open_engine(*session, options.model, {.context = context}));

  Progress bar("prefill", Progress::Unit::kTokens, length);
  request.on_prompt = [&bar](std::int32_t done, std::int32_t total) {
    bar.update(done);
    if (done == total) bar.finish();
  };
  Status written;
  if (!options.json) {
    request.on_text = [&written](std::string_view text) {
      if (written.ok()) written = write_stdout(text);
      if (!written.ok()) interrupted() = true;  // nobody reads: stop writing
    };
  }
  bar.update(0);
  engine::Completion completion = INFLLM_TRY(engine->generate(std::move(request)));
  bar.finish();
  INFLLM_TRY(written);
  return completion;
}

}  // namespace

int run_command(const Options& options) {
  std::unique_ptr<Session> session;
  const Result<engine::Completion> completion = answer(options, session);
  if (!completion.ok()) return report_failure(completion.status());
  const std::string last =
      options.json ? dump(completion_json(*session, *completion), 2) + "\n" : "\n";
  const Status written = write_stdout(last);
  if (!written.ok()) return report_failure(written);
  if (options.perf && !options.json) print_timings(*session, *completion);
  return completion->reason == engine::FinishReason::kCancelled ? kExitInterrupted : kExitOk;
}

}  // namespace infllm::app
