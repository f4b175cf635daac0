// SPDX-License-Identifier: Apache-2.0
//
// The first step of a tokenizer: rewrites a segment of text before it is cut into words.
#pragma once

#include <string>
#include <string_view>

#include "infllm/core/status.h"
#include "infllm/engine/byte_trie.h"
#include "infllm/engine/charsmap.h"
#include "infllm/engine/tokenizer_spec.h"

namespace infllm::engine {

class Normalizer {
 public:
  // kDataError when the character map is broken. Keeps a reference to spec.normalizer.
  static Result<Normalizer> create(const TokenizerSpec& spec);

  // `segment` is valid UTF-8, but for SentencePiece, which repairs it on the way. `at_start` says
  // whether it begins where the text begins; it becomes false when characters at the beginning are
  // dropped.
  std::string apply(std::string_view segment, bool& at_start) const;

 private:
  explicit Normalizer(const NormalizerSpec& spec) : spec_(&spec) {}
  std::string apply_steps(std::string_view segment, bool& at_start) const;
  std::string apply_sentencepiece(std::string_view segment, bool at_start) const;

  struct Unit {
    std::string_view text;
    std::size_t consumed = 0;
  };
  Unit next_unit(std::string_view text, std::size_t at) const;

  const NormalizerSpec* spec_;
  Charsmap charsmap_;
  ByteTrie user_defined_;  // pieces that the character map leaves alone
};

}  // namespace infllm::engine
