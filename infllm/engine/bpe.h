// SPDX-License-Identifier: Apache-2.0
//
// Byte-pair encoding of one word: start from characters, and as long as two neighbours have a merge
// rule, apply the rule of lowest rank (the leftmost among equals). O(n log n) in the word's length,
// by a heap of candidate pairs over a linked list of symbols.
//
// One engine serves both families: in tokenizer.json the rank is the rule's line number; in a
// SentencePiece model it is the place of the resulting piece's score, best first.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "infllm/engine/byte_trie.h"
#include "infllm/engine/tokenizer_spec.h"

namespace infllm::engine {

// Fills spec.merges and spec.extra_symbols from SentencePiece scores (one per piece, all finite):
// every way to cut a piece into two symbols is a rule whose rank orders the pieces by score.
void derive_merges_from_scores(const std::vector<float>& scores, TokenizerSpec& spec);

class Bpe {
 public:
  // Keeps views into `spec`, which must stay where it is.
  explicit Bpe(const TokenizerSpec& spec);

  // Appends the ids of `word`, valid UTF-8, to `ids`.
  void encode(std::string_view word, std::vector<std::int32_t>& ids) const;

  // The id of a model piece (no added token) with exactly this text; -1 when there is none.
  std::int32_t find(std::string_view piece) const;

 private:
  struct Rule {
    std::uint64_t pair = kNoPair;
    std::int32_t rank = 0;
    std::int32_t result = 0;
  };
  static constexpr std::uint64_t kNoPair = ~std::uint64_t{0};

  static std::uint64_t pair_key(std::int32_t left, std::int32_t right) {
    return (std::uint64_t{static_cast<std::uint32_t>(left)} << 32) |
           static_cast<std::uint32_t>(right);
  }
  const Rule* rule(std::int32_t left, std::int32_t right) const;
  std::int32_t symbol_of(char32_t code) const {
    return code < characters_.size() ? characters_[code] : -1;
  }
  void start_ranked(std::string_view word, std::vector<std::int32_t>& symbols) const;
  void start_scored(std::string_view word, std::vector<std::int32_t>& symbols) const;
  using UnusedPairs = std::unordered_map<std::int32_t, std::uint64_t>;
  UnusedPairs merge(std::vector<std::int32_t>& symbols) const;
  void finish_scored(std::int32_t symbol, const UnusedPairs& unused, std::vector<std::int32_t>& ids,
                     bool& after_unknown) const;

  const TokenizerSpec& spec_;
  bool scored_;  // SentencePiece's rules for unknown characters
  bool has_all_bytes_ = false;
  std::vector<Rule> rules_;               // open addressing, a power of two, at most half full
  std::vector<std::int32_t> characters_;  // code point -> symbol, -1 for none
  std::unordered_map<std::string_view, std::int32_t> vocabulary_;
  std::array<std::int32_t, 256> bytes_;  // id of <0xNN>, -1 for none
  ByteTrie user_defined_;                // pieces that are never split nor merged
  bool has_unused_ = false;
};

}  // namespace infllm::engine
