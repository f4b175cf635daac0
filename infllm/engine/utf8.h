// SPDX-License-Identifier: Apache-2.0
//
// UTF-8: decode one character, repair bytes that are not UTF-8, and hold back the unfinished
// character at the end of a stream. Well formed means RFC 3629: shortest form, no surrogates, at
// most U+10FFFF.
//
//   for (std::size_t at = 0; at < text.size();) {
//     const Utf8Char c = utf8_at(text, at);
//     at += c.bytes;                          // c.valid is false for a byte that starts nothing
//   }
//
//   std::string pending = "caf\xC3";
//   utf8_take(pending, Utf8Repair::kPerByte, false);  // "caf"; pending keeps "\xC3"
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace infllm::engine {

struct Utf8Char {
  char32_t code = 0;  // U+FFFD when not valid
  int bytes = 0;      // consumed; 1 when not valid
  bool valid = false;
};

// The character at byte `at` < text.size().
Utf8Char utf8_at(std::string_view text, std::size_t at);

// Appends `code`, a code point up to U+10FFFF, to `out`.
void utf8_append(std::string& out, char32_t code);

bool utf8_valid(std::string_view text);

// Number of characters; a byte that is not part of one counts as one.
std::int64_t utf8_length(std::string_view text);

// How bytes that are not UTF-8 become U+FFFD. Oracles differ, so both exist:
enum class Utf8Repair {
  kPerByte,         // one per offending byte (SentencePiece)
  kMaximalSubpart,  // one per longest prefix of a character (Unicode 3.9, WHATWG, Rust's lossy)
};
std::string utf8_repair(std::string_view text, Utf8Repair repair);

// Bytes at the end of `text` (0 to 3) that may yet become a character when more bytes follow.
std::size_t utf8_unfinished_tail(std::string_view text);

// Removes from `pending` all that is decided and returns it repaired. With `final`, that is
// everything. Feeding a text in pieces gives the same total as utf8_repair of the whole.
std::string utf8_take(std::string& pending, Utf8Repair repair, bool final);

}  // namespace infllm::engine
