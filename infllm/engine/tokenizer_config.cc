// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/tokenizer_config.h"

#include <fmt/format.h>

#include <charconv>

#include "infllm/core/json.h"
#include "infllm/engine/json_access.h"
#include "infllm/engine/text_file.h"
#include "infllm/engine/tokenizer_json_steps.h"

namespace infllm::engine {
namespace {

using Json = nlohmann::json;
constexpr std::size_t kMaxConfigBytes = std::size_t{16} << 20;
constexpr std::size_t kMaxTemplateFileBytes = std::size_t{1} << 20;

// The document, null when there is no such file.
Result<Json> read_optional_json(const std::filesystem::path& folder, const char* name) {
  Result<std::string> text = read_text_file(folder / name, kMaxConfigBytes);
  if (text.status().code() == StatusCode::kNotFound) return Json();
  if (!text.ok()) return text.status();
  Json json =
      INFLLM_TRY(parse_json(*text, {.what = name, .max_bytes = kMaxConfigBytes, .max_depth = 32}));
  if (!json.is_object()) return data_error(fmt::format("{}: not a JSON object", name));
  return json;
}

// A special token is a string or {"content": string, ...}; what is set stays.
Status read_token_text(const Json& json, const char* key, const char* where, std::string& text) {
  const Json& value = member(json, key);
  if (!text.empty() || value.is_null()) return {};
  text = INFLLM_TRY(value.is_object() ? string_member(value, "content", where)
                                      : string_member(json, key, where));
  return {};
}

Status read_special_tokens(const Json& json, const char* where, TokenizerConfig& config) {
  INFLLM_TRY(read_token_text(json, "bos_token", where, config.bos_token));
  INFLLM_TRY(read_token_text(json, "eos_token", where, config.eos_token));
  INFLLM_TRY(read_token_text(json, "unk_token", where, config.unk_token));
  return read_token_text(json, "pad_token", where, config.pad_token);
}

Status read_added_tokens(const Json& json, TokenizerConfig& config) {
  constexpr const char* kWhere = "tokenizer_config.json: added_tokens_decoder";
  const Json& decoder = member(json, "added_tokens_decoder");
  if (decoder.is_null()) return {};
  if (!decoder.is_object()) return wrong_type(kWhere, "added_tokens_decoder", decoder, "an object");
  for (const auto& [key, entry] : decoder.items()) {
    AddedToken token = INFLLM_TRY(read_added_token(entry, kWhere));
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), token.id);
    if (error != std::errc() || end != key.data() + key.size() || token.id < 0 ||
        token.id >= kMaxVocabulary) {
      return data_error(
          fmt::format("{}: \"{:.32}\" is no id from 0 to {}", kWhere, key, kMaxVocabulary - 1));
    }
    config.added_tokens.push_back(std::move(token));
  }
  return {};
}

Status read_templates(const Json& json, TokenizerConfig& config) {
  constexpr const char* kWhere = "tokenizer_config.json: chat_template";
  const Json& value = member(json, "chat_template");
  if (value.is_null()) return {};
  if (value.is_string()) {
    config.chat_templates["default"] = value.get<std::string>();
    return {};
  }
  if (!value.is_array()) return wrong_type(kWhere, "chat_template", value, "a string or an array");
  for (const Json& entry : value) {
    const std::string name = INFLLM_TRY(string_member(entry, "name", kWhere));
    config.chat_templates[name] = INFLLM_TRY(string_member(entry, "template", kWhere));
  }
  return {};
}

Status read_eos_ids(const Json& json, TokenizerConfig& config) {
  constexpr const char* kWhere = "generation_config.json: eos_token_id";
  const Json& value = member(json, "eos_token_id");
  if (value.is_null()) return {};
  if (!value.is_array()) {
    config.eos_ids.push_back(INFLLM_TRY(id_value(value, kWhere, kMaxVocabulary)));
    return {};
  }
  for (const Json& id : value) {
    config.eos_ids.push_back(INFLLM_TRY(id_value(id, kWhere, kMaxVocabulary)));
  }
  return {};
}

}  // namespace

Result<TokenizerConfig> read_tokenizer_config(const std::filesystem::path& folder) {
  TokenizerConfig config;
  const Json json = INFLLM_TRY(read_optional_json(folder, "tokenizer_config.json"));
  INFLLM_TRY(read_added_tokens(json, config));
  INFLLM_TRY(read_special_tokens(json, "tokenizer_config.json", config));
  INFLLM_TRY(read_templates(json, config));
  for (const auto& [key, target] :
       {std::pair{"add_bos_token", &config.add_bos}, {"add_eos_token", &config.add_eos}}) {
    if (member(json, key).is_null()) continue;
    *target = INFLLM_TRY(bool_member(json, key, "tokenizer_config.json", false));
  }
  config.legacy = INFLLM_TRY(bool_member(json, "legacy", "tokenizer_config.json", true));

  const Json map = INFLLM_TRY(read_optional_json(folder, "special_tokens_map.json"));
  INFLLM_TRY(read_special_tokens(map, "special_tokens_map.json", config));
  const Json generation = INFLLM_TRY(read_optional_json(folder, "generation_config.json"));
  INFLLM_TRY(read_eos_ids(generation, config));

  // The file of its own is the newer place and wins.
  Result<std::string> jinja = read_text_file(folder / "chat_template.jinja", kMaxTemplateFileBytes);
  if (jinja.ok()) {
    config.chat_templates["default"] = std::move(*jinja);
  } else if (jinja.status().code() != StatusCode::kNotFound) {
    return jinja.status();
  }
  return config;
}

}  // namespace infllm::engine
