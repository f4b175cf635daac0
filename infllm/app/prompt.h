// SPDX-License-Identifier: Apache-2.0
//
// The user's text, wherever it comes from, as a prompt's token ids.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "infllm/app/options.h"
#include "infllm/app/session.h"
#include "infllm/engine/chat_template.h"

namespace infllm::app {

// The argument, the file or standard input; kInvalidArgument when it is empty or a terminal would
// have to be asked.
Result<std::string> read_text(const PromptOptions& options);

// One user message that asks about a document: document, empty line, question. Line breaks at the
// document's end are dropped, because text files end with one and documents do not.
std::string document_message(std::string document, const std::string& question);

// The message of `run`: document and question, or the text.
Result<std::string> read_message(const PromptOptions& options);

// Renders conversations as the checkpoint's template wants them.
class Prompter {
 public:
  // Keeps references to both. Without chat template in the checkpoint, only raw() works; the others
  // say so.
  static Result<Prompter> create(const Session& session, const PromptOptions& options);

  // The conversation as a prompt that the assistant continues.
  Result<std::vector<std::int32_t>> chat(const std::vector<engine::ChatMessage>& messages) const;
  // The system message, if any, and one user message.
  Result<std::vector<std::int32_t>> ask(const std::string& message) const;
  // The text itself, without template.
  std::vector<std::int32_t> raw(const std::string& text) const;

 private:
  Prompter(const Session& session, const PromptOptions& options)
      : session_(session), options_(options) {}

  const Session& session_;
  const PromptOptions& options_;
  std::optional<engine::ChatTemplate> template_;
};

}  // namespace infllm::app
