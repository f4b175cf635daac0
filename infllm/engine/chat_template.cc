// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/chat_template.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "infllm/core/json.h"
#include "infllm/engine/jinja_interpreter.h"
#include "infllm/engine/jinja_parser.h"
#include "infllm/engine/utf8.h"

namespace infllm::engine {
namespace {

using Json = nlohmann::ordered_json;  // templates see members in the order they were written
using jinja::Value;

Result<Value> to_value(const Json& json, int depth) {
  const auto too_deep = [] {
    return invalid_argument(fmt::format("chat template: a variable nests deeper than {} levels",
                                        jinja::kMaxValueDepth));
  };
  if (depth > jinja::kMaxValueDepth) return too_deep();
  switch (json.type()) {
    case Json::value_t::boolean:
      return Value(json.get<bool>());
    case Json::value_t::number_integer:
      return Value(json.get<std::int64_t>());
    case Json::value_t::number_unsigned: {
      const auto number = json.get<std::uint64_t>();
      if (number > INT64_MAX) return Value(static_cast<double>(number));
      return Value(static_cast<std::int64_t>(number));
    }
    case Json::value_t::number_float:
      return Value(json.get<double>());
    case Json::value_t::string:
      return Value(utf8_repair(json.get_ref<const std::string&>(), Utf8Repair::kMaximalSubpart));
    case Json::value_t::array: {
      std::vector<Value> items;
      for (const Json& item : json) items.push_back(INFLLM_TRY(to_value(item, depth + 1)));
      std::optional<Value> list = jinja::make_list(std::move(items));
      return list ? Result<Value>(std::move(*list)) : too_deep();
    }
    case Json::value_t::object: {
      jinja::Dict dict;
      for (const auto& [key, item] : json.items()) {
        dict.set(key, INFLLM_TRY(to_value(item, depth + 1)));
      }
      std::optional<Value> made = jinja::make_dict(std::move(dict));
      return made ? Result<Value>(std::move(*made)) : too_deep();
    }
    default:
      return Value(jinja::None());
  }
}

}  // namespace

struct ChatTemplate::Tree {
  jinja::Block block;
};

ChatTemplate::ChatTemplate(std::unique_ptr<const Tree> tree) : tree_(std::move(tree)) {}
ChatTemplate::ChatTemplate(ChatTemplate&&) noexcept = default;
ChatTemplate& ChatTemplate::operator=(ChatTemplate&&) noexcept = default;
ChatTemplate::~ChatTemplate() = default;

Result<ChatTemplate> ChatTemplate::parse(std::string_view text) {
  auto tree = std::make_unique<Tree>();
  tree->block = INFLLM_TRY(jinja::parse(text));
  return ChatTemplate(std::move(tree));
}

namespace {

// The guard first; then once more, in the order of the text.
Result<Json> parse_ordered(std::string_view text, const char* what) {
  const auto checked = parse_json(text, {.what = what});
  if (!checked.ok()) return checked.status();
  return Json::parse(text, nullptr, /*allow_exceptions=*/false);
}

Result<jinja::RenderContext> make_context(Value messages, const ChatTemplateOptions& options) {
  jinja::RenderContext context;
  context.now = options.now;
  context.limits = options.limits;
  for (const auto& [name, token] : options.special_tokens) context.variables[name] = Value(token);
  if (!options.variables_json.empty()) {
    const Json json = INFLLM_TRY(parse_ordered(options.variables_json, "template variables"));
    if (!json.is_object()) return invalid_argument("template variables: not a JSON object");
    for (const auto& [name, value] : json.items()) {
      context.variables[name] = INFLLM_TRY(to_value(value, 1));
    }
  }
  context.variables["messages"] = std::move(messages);
  context.variables["add_generation_prompt"] = Value(options.add_generation_prompt);
  if (options.enable_thinking) {
    context.variables["enable_thinking"] = Value(*options.enable_thinking);
  }
  return context;
}

}  // namespace

Result<std::string> ChatTemplate::render(const std::vector<ChatMessage>& messages,
                                         const ChatTemplateOptions& options) const {
  Json json = Json::array();
  for (const ChatMessage& message : messages) {
    json.push_back({{"role", message.role}, {"content", message.content}});
  }
  return jinja::render(tree_->block,
                       INFLLM_TRY(make_context(INFLLM_TRY(to_value(json, 1)), options)));
}

Result<std::string> ChatTemplate::render_json(std::string_view messages,
                                              const ChatTemplateOptions& options) const {
  const Json json = INFLLM_TRY(parse_ordered(messages, "messages"));
  if (!json.is_array()) return invalid_argument("messages: not a JSON array");
  return jinja::render(tree_->block,
                       INFLLM_TRY(make_context(INFLLM_TRY(to_value(json, 1)), options)));
}

}  // namespace infllm::engine
