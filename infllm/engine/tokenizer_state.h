// SPDX-License-Identifier: Apache-2.0
//
// The inside of a Tokenizer, shared by its encoding (tokenizer.cc) and decoding (token_decoder.cc).
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "infllm/engine/added_tokens.h"
#include "infllm/engine/bpe.h"
#include "infllm/engine/normalizer.h"
#include "infllm/engine/tokenizer.h"

namespace infllm::engine {

struct Tokenizer::State {
  explicit State(TokenizerSpec tokenizer_spec) : spec(std::move(tokenizer_spec)) {}

  const TokenizerSpec spec;  // the members below keep views into it
  std::optional<Normalizer> normalizer;
  std::optional<Bpe> bpe;
  AddedTokens added_tokens;       // looked for in the text as it is
  AddedTokens normalized_tokens;  // looked for in the normalized text
  std::unordered_map<std::string_view, std::int32_t> ids;
  std::vector<std::string> text;  // by id: what it adds to a text when it is not the first
  std::vector<bool> special;
  std::vector<std::int32_t> eos_ids;
  std::map<std::string, std::string> special_tokens;
  std::map<std::string, std::string> chat_templates;
};

}  // namespace infllm::engine
