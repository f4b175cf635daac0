// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <unistd.h>

#include "infllm/app/commands.h"
#include "infllm/app/line_editor.h"
#include "infllm/app/progress.h"
#include "infllm/app/prompt.h"
#include "infllm/app/report.h"
#include "infllm/app/sampling.h"
#include "infllm/app/signals.h"

namespace infllm::app {
namespace {

constexpr char kHelp[] =
    "/clear  forget the conversation\n"
    "/exit   leave (also Ctrl-D)\n"
    "/help   this list\n"
    "Ctrl-C stops an answer; once more, it leaves.\n";

class Chat {
 public:
  Chat(const Session& session, const Options& options, const Prompter& prompter,
       engine::Engine& engine)
      : session_(session), options_(options), prompter_(prompter), engine_(engine) {
    clear();
  }

  Status loop() {
    for (;;) {
      // The flag stays up from a Ctrl-C to the next line, so that a second one leaves (signals.h).
      const bool was_up = interrupted();
      const std::optional<std::string> line = read_line("> ");
      if (!line && interrupted() && !was_up) {
        fmt::print(stderr, "\n(Ctrl-C once more, Ctrl-D or /exit leaves)\n");
        continue;
      }
      if (!line) return interrupted() ? cancelled("interrupted") : Status();
      interrupted() = false;
      if (line->empty()) continue;
      if (*line == "/exit" || *line == "/quit" || *line == "/bye") return {};
      if (line->front() == '/') {
        command(*line);
      } else {
        INFLLM_TRY(turn(*line));
      }
    }
  }

 private:
  void clear() {
    messages_.clear();
    if (!options_.prompt.system.empty()) messages_.push_back({"system", options_.prompt.system});
  }

  void command(const std::string& line) {
    if (line == "/clear") {
      clear();
      fmt::print(stderr, "forgotten\n");
    } else if (line == "/help") {
      fmt::print(stderr, "{}", kHelp);
    } else {
      fmt::print(stderr, "no command {}; /help shows those there are\n", line);
    }
  }

  // One question and its answer. What the context cannot hold is told, and not kept.
  Status turn(const std::string& question) {
    messages_.push_back({"user", question});
    engine::Request request = INFLLM_TRY(base_request(session_, options_));
    request.prompt = INFLLM_TRY(prompter_.chat(messages_));
    Progress bar("prefill", Progress::Unit::kTokens,
                 static_cast<std::int64_t>(request.prompt.size()));
    request.on_prompt = [&bar](std::int32_t done, std::int32_t total) {
      bar.update(done);
      if (done == total) bar.finish();
    };
    Status written;
    request.on_text = [&written](std::string_view text) {
      if (written.ok()) written = write_stdout(text);
      if (!written.ok()) interrupted() = true;
    };
    const Result<engine::Completion> answer = engine_.generate(std::move(request));
    bar.finish();
    if (!answer.ok() && answer.status().code() == StatusCode::kInvalidArgument) {
      messages_.pop_back();
      fmt::print(stderr, "error: {}; /clear starts anew\n", answer.status().message());
      return {};
    }
    if (!answer.ok()) return answer.status();
    INFLLM_TRY(written);
    INFLLM_TRY(write_stdout("\n"));
    messages_.push_back({"assistant", answer->text});
    if (options_.model.verbose) print_timings(session_, *answer);
    return {};
  }

  const Session& session_;
  const Options& options_;
  const Prompter& prompter_;
  engine::Engine& engine_;
  std::vector<engine::ChatMessage> messages_;
};

Status chat(const Options& options) {
  const std::unique_ptr<Session> session = INFLLM_TRY(open_session(options.model));
  print_effective_values(*session, options.model, context_tokens(*session, options.model));
  const Prompter prompter = INFLLM_TRY(Prompter::create(*session, options.prompt));
  const std::unique_ptr<engine::Engine> engine = INFLLM_TRY(open_engine(*session, options.model));
  if (isatty(STDIN_FILENO) == 1) {
    fmt::print(stderr, "{} on {}, {}\n/help shows the commands\n", session->name,
               session->backend.name, attention_text(session->config()));
  }
  return Chat(*session, options, prompter, *engine).loop();
}

}  // namespace

int chat_command(const Options& options) {
  const Status status = chat(options);
  return status.ok() ? kExitOk : report_failure(status);
}

}  // namespace infllm::app
