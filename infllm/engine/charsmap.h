// SPDX-License-Identifier: Apache-2.0
//
// SentencePiece's precompiled character map (nmt_nfkc and its like): a double-array trie from
// source strings to offsets of zero-terminated replacements.
//
//   blob = u32 trie_bytes, trie units (u32 each, little endian), replacements
//
// A unit packs, from the low end: the byte it is reached by (8 bits), has_leaf (bit 8), a scale for
// the offset (bit 9) and the offset to its children (from bit 10); a leaf holds a 31-bit value.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "infllm/core/status.h"

namespace infllm::engine {

class Charsmap {
 public:
  // The identity.
  Charsmap() = default;
  // kDataError when the blob is cut short or the trie points outside it.
  static Result<Charsmap> parse(std::string_view blob);

  struct Match {
    std::size_t bytes = 0;  // of the source; 0: nothing is replaced here
    std::string_view replacement;
  };
  // The longest replaced string that begins at `at`.
  Match longest(std::string_view text, std::size_t at) const;

 private:
  std::vector<std::uint32_t> units_;
  std::string replacements_;
};

}  // namespace infllm::engine
