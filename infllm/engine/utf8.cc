// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/utf8.h"

#include <algorithm>

namespace infllm::engine {
namespace {

constexpr char32_t kReplacement = 0xFFFD;

struct Lead {
  int bytes;           // length that the first byte announces; 0 when it announces none
  unsigned char low;   // range of the second byte: what keeps out overlong forms, surrogates and
  unsigned char high;  // code points above U+10FFFF
};

Lead lead_of(unsigned char byte) {
  if (byte < 0x80) return {1, 0, 0};
  if (byte < 0xC2) return {0, 0, 0};
  if (byte < 0xE0) return {2, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte < 0xF0) return {3, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte < 0xF4) return {4, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

// Length of the longest prefix of a character at `at`, at least 1 byte, and whether it is whole.
struct Prefix {
  int bytes;
  bool whole;
  bool cut;  // stopped by the end of the text, not by a wrong byte
};

Prefix prefix_at(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const Lead lead = lead_of(byte(at));
  if (lead.bytes <= 1) return {1, lead.bytes == 1, false};
  for (int i = 1; i < lead.bytes; ++i) {
    if (at + i >= text.size()) return {i, false, true};
    const unsigned char next = byte(at + i);
    const unsigned char low = i == 1 ? lead.low : 0x80;
    const unsigned char high = i == 1 ? lead.high : 0xBF;
    if (next < low || next > high) return {i, false, false};
  }
  return {lead.bytes, true, false};
}

}  // namespace

Utf8Char utf8_at(std::string_view text, std::size_t at) {
  const Prefix prefix = prefix_at(text, at);
  if (!prefix.whole) return {kReplacement, 1, false};
  const auto byte = [&](int i) { return static_cast<unsigned char>(text[at + i]); };
  char32_t code = byte(0);
  if (prefix.bytes > 1) {
    code &= 0x7Fu >> prefix.bytes;
    for (int i = 1; i < prefix.bytes; ++i) code = (code << 6) | (byte(i) & 0x3Fu);
  }
  return {code, prefix.bytes, true};
}

void utf8_append(std::string& out, char32_t code) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | (code >> 6));
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xE0 | (code >> 12));
    out += static_cast<char>(0x80 | ((code >> 6) & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | (code >> 18));
    out += static_cast<char>(0x80 | ((code >> 12) & 0x3F));
    out += static_cast<char>(0x80 | ((code >> 6) & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  }
}

bool utf8_valid(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const Prefix prefix = prefix_at(text, at);
    if (!prefix.whole) return false;
    at += prefix.bytes;
  }
  return true;
}

std::int64_t utf8_length(std::string_view text) {
  std::int64_t length = 0;
  for (std::size_t at = 0; at < text.size(); at += utf8_at(text, at).bytes) ++length;
  return length;
}

std::string utf8_repair(std::string_view text, Utf8Repair repair) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const Prefix prefix = prefix_at(text, at);
    if (prefix.whole) {
      out.append(text, at, prefix.bytes);
      at += prefix.bytes;
    } else {
      utf8_append(out, kReplacement);
      at += repair == Utf8Repair::kPerByte ? 1 : prefix.bytes;
    }
  }
  return out;
}

std::size_t utf8_unfinished_tail(std::string_view text) {
  const std::size_t longest = std::min<std::size_t>(3, text.size());
  for (std::size_t tail = longest; tail > 0; --tail) {
    const Prefix prefix = prefix_at(text, text.size() - tail);
    if (prefix.cut && prefix.bytes == static_cast<int>(tail)) return tail;
  }
  return 0;
}

std::string utf8_take(std::string& pending, Utf8Repair repair, bool final) {
  const std::size_t keep = final ? 0 : utf8_unfinished_tail(pending);
  std::string out = utf8_repair(std::string_view(pending).substr(0, pending.size() - keep), repair);
  pending.erase(0, pending.size() - keep);
  return out;
}

}  // namespace infllm::engine
