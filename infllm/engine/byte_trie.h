// SPDX-License-Identifier: Apache-2.0
//
// A set of byte strings, each with a value, that answers: which is the longest one that begins
// here? Cost: at most the length of that string in look-ups, whatever the number of strings.
//
//   ByteTrie trie;
//   trie.insert("<s>", 1);
//   trie.longest_prefix("<s>Hi", 0);  // {value 1, bytes 3}
#pragma once

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace infllm::engine {

class ByteTrie {
 public:
  struct Match {
    std::int32_t value = -1;  // -1: none begins here
    std::size_t bytes = 0;
  };

  // The last value given for a text wins. An empty text is never found.
  void insert(std::string_view text, std::int32_t value) {
    if (text.empty()) return;
    begins_.set(static_cast<unsigned char>(text[0]));
    std::uint32_t node = 0;
    for (const char c : text) {
      const auto [edge, is_new] =
          edges_.try_emplace(key(node, c), static_cast<std::uint32_t>(values_.size()));
      if (is_new) values_.push_back(-1);
      node = edge->second;
    }
    values_[node] = value;
  }

  bool empty() const { return edges_.empty(); }

  Match longest_prefix(std::string_view text, std::size_t at) const {
    Match best;
    if (at >= text.size() || !begins_[static_cast<unsigned char>(text[at])]) return best;
    std::uint32_t node = 0;
    for (std::size_t i = at; i < text.size(); ++i) {
      const auto edge = edges_.find(key(node, text[i]));
      if (edge == edges_.end()) break;
      node = edge->second;
      if (values_[node] >= 0) best = {values_[node], i + 1 - at};
    }
    return best;
  }

 private:
  static std::uint64_t key(std::uint32_t node, char c) {
    return (std::uint64_t{node} << 8) | static_cast<unsigned char>(c);
  }

  std::bitset<256> begins_;
  std::unordered_map<std::uint64_t, std::uint32_t> edges_;
  std::vector<std::int32_t> values_{-1};  // by node; the root is 0
};

}  // namespace infllm::engine
