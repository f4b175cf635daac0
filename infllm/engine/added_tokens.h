// SPDX-License-Identifier: Apache-2.0
//
// Finds added tokens in a text: the leftmost, and of those that begin there the longest. Each
// token's flags then decide whether the match counts and how much white space around it goes with
// it.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "infllm/engine/byte_trie.h"
#include "infllm/engine/tokenizer_spec.h"

namespace infllm::engine {

class AddedTokens {
 public:
  // `pattern` is what is looked for: the token's text, or its normalized form.
  void add(const AddedToken& token, std::string_view pattern);

  struct Part {
    std::string_view text;
    std::int32_t id = -1;  // -1: plain text
  };
  // The parts of `text` in order, none of them empty plain text. Special tokens are left in the
  // plain text unless `parse_special`.
  std::vector<Part> split(std::string_view text, bool parse_special) const;

 private:
  ByteTrie trie_;
  std::vector<AddedToken> tokens_;  // by the trie's value
};

}  // namespace infllm::engine
