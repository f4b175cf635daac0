// SPDX-License-Identifier: Apache-2.0
//
// The chat template of a checkpoint: messages -> the text that the model was trained on.
//
//   ChatTemplate chat = INFLLM_TRY(ChatTemplate::parse(tokenizer.chat_templates().at("default")));
//   std::string prompt = INFLLM_TRY(chat.render({{"user", "Hello"}}, {}));
//
// Templates are programs from outside, written in a subset of Jinja: what Hugging Face templates
// use, with Python's values and Hugging Face's settings (trim_blocks, lstrip_blocks, loop controls,
// {% generation %}, tojson without HTML escapes). Results equal jinja2's. A template cannot reach
// anything but its variables, and has budgets: 64 KiB of text, a million steps, 4 MiB of output, 32
// levels of nesting and of macro calls; errors name the line.
//
// Not in the subset: import, include, extends, do, recursive loops, *args, % formatting, keys of a
// dict that are not strings, and changing the case of letters beyond ASCII. These fail with a
// message.
//
// Thread safety: a ChatTemplate never changes; render() may run in many threads at once.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "infllm/core/status.h"

namespace infllm::engine {

struct ChatMessage {
  std::string role;
  std::string content;
};

// What one rendering may spend.
struct RenderLimits {
  std::int64_t steps = 1'000'000;
  std::int64_t output_bytes = std::int64_t{4} << 20;
  std::int64_t work_bytes = std::int64_t{128} << 20;  // of all strings and lists made on the way
  std::int32_t macro_depth = 32;
};

struct ChatTemplateOptions {
  bool add_generation_prompt = true;    // end where the assistant's answer begins
  std::optional<bool> enable_thinking;  // for templates that know it; else not defined
  // bos_token, eos_token and so on: Tokenizer::special_tokens().
  std::map<std::string, std::string> special_tokens;
  // More variables as one JSON object, e.g. {"tools": [...]}; empty for none.
  std::string variables_json;
  // Seconds since 1970, UTC. Without it strftime_now is not defined, and templates that ask for it
  // with "is defined" fall back to a fixed date.
  std::optional<std::int64_t> now;
  RenderLimits limits;
};

class ChatTemplate {
 public:
  static Result<ChatTemplate> parse(std::string_view text);

  ChatTemplate(ChatTemplate&&) noexcept;
  ChatTemplate& operator=(ChatTemplate&&) noexcept;
  ~ChatTemplate();

  Result<std::string> render(const std::vector<ChatMessage>& messages,
                             const ChatTemplateOptions& options) const;
  // Messages as the chat API has them, as JSON text: an array of objects with any members, which
  // templates see in the order in which they are written.
  Result<std::string> render_json(std::string_view messages,
                                  const ChatTemplateOptions& options) const;

 private:
  struct Tree;
  explicit ChatTemplate(std::unique_ptr<const Tree> tree);
  std::unique_ptr<const Tree> tree_;
};

}  // namespace infllm::engine
