// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/utf8.h"

#include <gtest/gtest.h>

#include "infllm/engine/unicode_tables.h"
#include "tests/support/text_golden.h"

namespace infllm::engine {
namespace {

TEST(Utf8, EveryCodePointRoundTrips) {
  for (char32_t code = 0; code <= 0x10FFFF; ++code) {
    std::string text;
    utf8_append(text, code);
    const Utf8Char c = utf8_at(text, 0);
    const bool surrogate = code >= 0xD800 && code < 0xE000;
    ASSERT_EQ(c.valid, !surrogate) << static_cast<std::uint32_t>(code);
    ASSERT_EQ(utf8_valid(text), !surrogate);
    if (surrogate) continue;
    ASSERT_EQ(c.code, code);
    ASSERT_EQ(c.bytes, static_cast<int>(text.size()));
    // Every proper prefix is unfinished, and invalid on its own.
    for (std::size_t size = 1; size < text.size(); ++size) {
      ASSERT_EQ(utf8_unfinished_tail("x" + text.substr(0, size)), size);
      ASSERT_FALSE(utf8_valid(text.substr(0, size)));
    }
    ASSERT_EQ(utf8_unfinished_tail(text), 0u);
  }
}

TEST(Utf8, RepairsAsEachOracleDoes) {
  struct Case {
    std::string bytes;
    int per_byte, subparts;  // replacement characters
  };
  const Case cases[] = {
      {"\xFF", 1, 1},         {"\x80\x80", 2, 2},         {"\xC0\xAF", 2, 2},
      {"\xE2\x82", 2, 1},     {"\xE2\x82\x41", 2, 1},     {"\xF0\x9F\x98", 3, 1},
      {"\xED\xA0\x80", 3, 3}, {"\xF4\x90\x80\x80", 4, 4}, {"\xE0\x80\x80", 3, 3},
      {"\xF0\x9F\x41", 2, 1}, {"\xC3\xC3\xA9", 1, 1},     {"\xF8\x88\x80\x80\x80", 5, 5},
  };
  const auto count = [](const std::string& text) {
    int n = 0;
    for (std::size_t at = 0; (at = text.find("\xEF\xBF\xBD", at)) != std::string::npos; at += 3)
      ++n;
    return n;
  };
  for (const Case& c : cases) {
    EXPECT_EQ(count(utf8_repair(c.bytes, Utf8Repair::kPerByte)), c.per_byte) << c.bytes;
    EXPECT_EQ(count(utf8_repair(c.bytes, Utf8Repair::kMaximalSubpart)), c.subparts) << c.bytes;
  }
  EXPECT_EQ(utf8_length("a\xC3\xA9\xE4\xBD\xA0\xF0\x9F\x98\x80\xFF"), 5);
}

TEST(Utf8, PiecesOfAStreamMakeTheRepairedWhole) {
  const std::string alphabet =
      "\x41\x80\xBF\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\xED\xA0\xF4\x90\xFF";
  for (std::uint64_t seed = 0; seed < 50'000; ++seed) {
    test::SplitMix random(seed);
    std::string text(random.below(12), '\0');
    for (char& c : text) c = alphabet[random.below(alphabet.size())];
    for (const Utf8Repair repair : {Utf8Repair::kPerByte, Utf8Repair::kMaximalSubpart}) {
      std::string pending, got;
      for (const char c : text) {
        pending += c;
        const std::string piece = utf8_take(pending, repair, false);
        ASSERT_TRUE(utf8_valid(piece));
        ASSERT_LE(pending.size(), 3u);
        got += piece;
      }
      got += utf8_take(pending, repair, true);
      ASSERT_EQ(got, utf8_repair(text, repair));
      ASSERT_TRUE(pending.empty());
    }
  }
}

TEST(UnicodeTables, KnownMembers) {
  EXPECT_TRUE(is_letter('a') && is_letter(0x4F60) && is_letter(0x17F) && !is_letter('1'));
  EXPECT_TRUE(is_number('1') && is_number(0xBD) && is_number(0x216B) && !is_number('a'));
  EXPECT_TRUE(is_word('_') && is_word('a') && is_word('1') && !is_word(' ') && !is_word('-'));
  EXPECT_TRUE(is_printable(' ') && !is_printable(0xA0) && !is_printable(0x200B) &&
              !is_printable(0));
  EXPECT_TRUE(!is_printable(0x10FFFF) && is_printable(0x1F600));
}

}  // namespace
}  // namespace infllm::engine
