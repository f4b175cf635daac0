// SPDX-License-Identifier: Apache-2.0
//
// What a checkpoint says about its tokenizer outside of the tokenizer file: tokenizer_config.json,
// special_tokens_map.json, generation_config.json and chat_template.jinja. All of them are
// optional.
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "infllm/core/status.h"
#include "infllm/engine/tokenizer_spec.h"

namespace infllm::engine {

struct TokenizerConfig {
  std::vector<AddedToken> added_tokens;
  std::optional<bool> add_bos, add_eos;  // tokenizer_config.json overrides the tokenizer file
  bool legacy = true;  // false: only the beginning of a text gets the dummy prefix
  std::string bos_token, eos_token, unk_token, pad_token;  // texts, empty when not given
  std::vector<std::int32_t> eos_ids;                       // of generation_config.json
  // By name; "default" is the one to use, and the only one in most checkpoints.
  std::map<std::string, std::string> chat_templates;
};

Result<TokenizerConfig> read_tokenizer_config(const std::filesystem::path& folder);

}  // namespace infllm::engine
