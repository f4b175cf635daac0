// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/added_tokens.h"

#include <algorithm>

#include "infllm/engine/unicode_tables.h"
#include "infllm/engine/utf8.h"

namespace infllm::engine {
namespace {

// Start of the last character before `at` > 0.
std::size_t previous_character(std::string_view text, std::size_t at) {
  do {
    --at;
  } while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80);
  return at;
}

bool word_before(std::string_view text, std::size_t at) {
  return at > 0 && is_word(utf8_at(text, previous_character(text, at)).code);
}

bool word_after(std::string_view text, std::size_t at) {
  return at < text.size() && is_word(utf8_at(text, at).code);
}

}  // namespace

void AddedTokens::add(const AddedToken& token, std::string_view pattern) {
  trie_.insert(pattern, static_cast<std::int32_t>(tokens_.size()));
  tokens_.push_back(token);
}

std::vector<AddedTokens::Part> AddedTokens::split(std::string_view text, bool parse_special) const {
  std::vector<Part> parts;
  std::size_t done = 0;  // everything before is in `parts`
  for (std::size_t at = 0; at < text.size() && !trie_.empty();) {
    const ByteTrie::Match match = trie_.longest_prefix(text, at);
    if (match.value < 0) {
      ++at;
      continue;
    }
    std::size_t begin = at, end = at + match.bytes;
    at = end;
    const AddedToken& token = tokens_[match.value];
    if (token.special && !parse_special) continue;
    if (token.single_word && (word_before(text, begin) || word_after(text, end))) continue;
    if (token.lstrip) {
      while (begin > done && is_space(utf8_at(text, previous_character(text, begin)).code)) {
        begin = previous_character(text, begin);
      }
    }
    while (token.rstrip && end < text.size() && is_space(utf8_at(text, end).code)) {
      end += utf8_at(text, end).bytes;
    }
    if (begin > done) parts.push_back({text.substr(done, begin - done), -1});
    parts.push_back({text.substr(begin, end - begin), token.id});
    done = std::max(done, end);
  }
  if (done < text.size()) parts.push_back({text.substr(done), -1});
  return parts;
}

}  // namespace infllm::engine
