// SPDX-License-Identifier: Apache-2.0
#include "infllm/app/prompt.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace infllm::app {
namespace {

Result<std::string> read_file(const std::string& path) {
  if (path == "-") {
    std::string text;
    char buffer[1 << 16];
    for (std::size_t count; (count = std::fread(buffer, 1, sizeof(buffer), stdin)) > 0;) {
      text.append(buffer, count);
    }
    return text;
  }
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    return invalid_argument(fmt::format("{}: is a folder, expected a text file", path));
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) return not_found(fmt::format("{}: no such file, or it cannot be read", path));
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) return io_error(fmt::format("{}: cannot be read", path));
  return text;
}

bool is_blank(const std::string& text) {
  return text.find_first_not_of(" \t\r\n") == std::string::npos;
}

}  // namespace

Result<std::string> read_text(const PromptOptions& options) {
  std::string text = options.text;
  if (!options.file.empty()) {
    text = INFLLM_TRY(read_file(options.file));
  } else if (text.empty() || text == "-") {
    if (text.empty() && isatty(STDIN_FILENO) == 1) {
      return invalid_argument("no text given; pass it as an argument, with --file or on stdin");
    }
    text = INFLLM_TRY(read_file("-"));
  }
  if (is_blank(text)) {
    return invalid_argument(
        options.file.empty() || options.file == "-"
            ? "the text is empty; pass it as an argument, with --file or on stdin"
            : fmt::format("{}: the text is empty", options.file));
  }
  return text;
}

std::string document_message(std::string document, const std::string& question) {
  while (document.ends_with('\n') || document.ends_with('\r')) document.pop_back();
  return document + "\n\n" + question;
}

Result<std::string> read_message(const PromptOptions& options) {
  if (options.document.empty()) return read_text(options);
  const std::string document = INFLLM_TRY(read_file(options.document));
  if (is_blank(document)) {
    return invalid_argument(fmt::format("{}: the document is empty", options.document));
  }
  if (is_blank(options.question)) return invalid_argument("the question is empty");
  return document_message(document, options.question);
}

Result<Prompter> Prompter::create(const Session& session, const PromptOptions& options) {
  Prompter prompter(session, options);
  const auto& templates = session.tokenizer->chat_templates();
  const auto chosen = templates.find("default");
  if (chosen == templates.end()) return prompter;
  prompter.template_ = INFLLM_TRY(engine::ChatTemplate::parse(chosen->second));
  return prompter;
}

Result<std::vector<std::int32_t>> Prompter::chat(
    const std::vector<engine::ChatMessage>& messages) const {
  if (!template_) {
    return unsupported("this checkpoint has no chat template; add --no-chat to continue a text");
  }
  const std::string text = INFLLM_TRY(
      template_->render(messages, {.enable_thinking = options_.enable_thinking,
                                   .special_tokens = session_.tokenizer->special_tokens(),
                                   .now = std::time(nullptr)}));
  // Some templates write the beginning-of-text token themselves; then it is not added again.
  const std::string_view bos = session_.tokenizer->piece(session_.tokenizer->bos_id());
  return session_.tokenizer->encode(text, {.add_bos = bos.empty() || !text.starts_with(bos)});
}

Result<std::vector<std::int32_t>> Prompter::ask(const std::string& message) const {
  std::vector<engine::ChatMessage> messages;
  if (!options_.system.empty()) messages.push_back({"system", options_.system});
  messages.push_back({"user", message});
  return chat(messages);
}

std::vector<std::int32_t> Prompter::raw(const std::string& text) const {
  return session_.tokenizer->encode(text, {});
}

}  // namespace infllm::app
