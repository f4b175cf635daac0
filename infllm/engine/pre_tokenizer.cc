// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/pre_tokenizer.h"

#include <array>

#include "infllm/engine/unicode_tables.h"
#include "infllm/engine/utf8.h"

namespace infllm::engine {
namespace {

constexpr std::string_view kGpt2Regex =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr std::string_view kLlama3Regex =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|)"
    R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kQwen2Regex =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|)"
    R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

enum class Class { kEnd, kLetter, kNumber, kSpace, kNewline, kOther };  // kNewline: \r and \n

Class class_of(char32_t code) {
  if (code == '\r' || code == '\n') return Class::kNewline;
  if (is_space(code)) return Class::kSpace;
  if (is_letter(code)) return Class::kLetter;
  return is_number(code) ? Class::kNumber : Class::kOther;
}

// One character ahead of the scan: where it ends and what it is.
struct Look {
  std::size_t end;
  char32_t code;
  Class kind;
};

class Scanner {
 public:
  Scanner(SplitPattern pattern, std::string_view text) : pattern_(pattern), text_(text) {}

  // End of the word that begins at `at` < text.size().
  std::size_t word_end(std::size_t at) const {
    if (const std::size_t end = contraction(at); end > 0) return end;
    const Look first = look(at);
    const Look second = look(first.end);
    const bool gpt2 = pattern_ == SplitPattern::kGpt2;
    // Letters, after one space (GPT-2) or one character that is no newline and no number.
    if (first.kind == Class::kLetter) return run(at, Class::kLetter);
    const bool may_lead =
        gpt2 ? first.code == ' ' : first.kind == Class::kSpace || first.kind == Class::kOther;
    if (may_lead && second.kind == Class::kLetter) return run(first.end, Class::kLetter);
    // Numbers.
    if (first.kind == Class::kNumber) {
      const int most = gpt2 ? 0 : pattern_ == SplitPattern::kLlama3 ? 3 : 1;
      return run(at, Class::kNumber, most);
    }
    if (gpt2 && first.code == ' ' && second.kind == Class::kNumber) {
      return run(first.end, Class::kNumber);
    }
    // Anything else, after one space; newlines that follow belong to it (not in GPT-2).
    if (first.kind == Class::kOther || (first.code == ' ' && second.kind == Class::kOther)) {
      const std::size_t end = run(first.kind == Class::kOther ? at : first.end, Class::kOther);
      return gpt2 ? end : run(end, Class::kNewline);
    }
    return white_space(at);
  }

 private:
  Look look(std::size_t at) const {
    if (at >= text_.size()) return {at, 0, Class::kEnd};
    const Utf8Char c = utf8_at(text_, at);
    return {at + c.bytes, c.code, class_of(c.code)};
  }

  std::size_t run(std::size_t at, Class kind, int most = 0) const {
    for (int count = 0; most == 0 || count < most; ++count) {
      const Look next = look(at);
      if (next.kind != kind) break;
      at = next.end;
    }
    return at;
  }

  // 's 't 're 've 'm 'll 'd, in any case but for GPT-2; 0 when there is none. Without case the long
  // s (U+017F) is an s too.
  std::size_t contraction(std::size_t at) const {
    if (text_[at] != '\'') return 0;
    const auto lower = [&](const Look& c) -> char32_t {
      if (pattern_ == SplitPattern::kGpt2) return c.code;
      if (c.code == 0x17F) return 's';
      return c.code >= 'A' && c.code <= 'Z' ? c.code + ('a' - 'A') : c.code;
    };
    const Look first = look(at + 1);
    if (first.kind == Class::kEnd) return 0;
    const char32_t a = lower(first);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return first.end;
    const Look second = look(first.end);
    if (second.kind == Class::kEnd) return 0;
    const char32_t b = lower(second);
    const bool both = (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l');
    return both ? second.end : 0;
  }

  // Up to the last newline of the run, if it has one (not in GPT-2). Otherwise the run, less its
  // last character when a word follows, which then begins with that character.
  std::size_t white_space(std::size_t at) const {
    std::size_t end = at, last_start = at, newline_end = 0;
    for (Look next = look(at); next.kind == Class::kSpace || next.kind == Class::kNewline;
         next = look(end)) {
      last_start = end;
      end = next.end;
      if (next.kind == Class::kNewline) newline_end = end;
    }
    if (newline_end > 0 && pattern_ != SplitPattern::kGpt2) return newline_end;
    return end < text_.size() && last_start > at ? last_start : end;
  }

  SplitPattern pattern_;
  std::string_view text_;
};

struct ByteAlphabet {
  std::array<char32_t, 256> character;
  std::array<int, 512> byte;  // every character of the alphabet is below 512
};

const ByteAlphabet& byte_alphabet() {
  static const ByteAlphabet alphabet = [] {
    ByteAlphabet out;
    out.byte.fill(-1);
    char32_t next = 256;
    for (int b = 0; b < 256; ++b) {
      const bool itself = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      out.character[b] = itself ? static_cast<char32_t>(b) : next++;
      out.byte[out.character[b]] = b;
    }
    return out;
  }();
  return alphabet;
}

std::vector<std::string> cut_at_markers(const std::string& text) {
  std::vector<std::string> words;
  std::size_t begin = 0;
  while (begin < text.size()) {
    std::size_t end = text.find(kSpaceMarker, begin + 1);
    if (end == std::string::npos) end = text.size();
    words.push_back(text.substr(begin, end - begin));
    begin = end;
  }
  return words;
}

std::vector<std::string> metaspace(const PreTokenizerSpec& spec, std::string_view segment,
                                   bool at_start) {
  std::string text;
  text.reserve(segment.size() + segment.size() / 2);
  for (const char c : segment) {
    if (c == ' ') {
      text += kSpaceMarker;
    } else {
      text += c;
    }
  }
  const bool prepend =
      spec.prepend == PrependScheme::kAlways || (spec.prepend == PrependScheme::kFirst && at_start);
  if (prepend && !text.starts_with(kSpaceMarker)) text.insert(0, kSpaceMarker);
  if (spec.metaspace_split) return cut_at_markers(text);
  return {std::move(text)};
}

}  // namespace

SplitPattern known_split_pattern(std::string_view regex) {
  if (regex == kGpt2Regex) return SplitPattern::kGpt2;
  if (regex == kLlama3Regex) return SplitPattern::kLlama3;
  if (regex == kQwen2Regex) return SplitPattern::kQwen2;
  return SplitPattern::kNone;
}

char32_t byte_level_character(unsigned char byte) { return byte_alphabet().character[byte]; }

int byte_level_byte(char32_t character) {
  return character < 512 ? byte_alphabet().byte[character] : -1;
}

std::vector<std::string> pre_tokenize(const PreTokenizerSpec& spec, std::string_view segment,
                                      bool at_start) {
  if (spec.metaspace) return metaspace(spec, segment, at_start);
  if (!spec.byte_level) return {std::string(segment)};

  std::string with_space;
  if (spec.add_prefix_space && !segment.starts_with(' ')) {
    with_space.append(" ").append(segment);
    segment = with_space;
  }
  std::vector<std::string> words;
  const Scanner scanner(spec.pattern, segment);
  for (std::size_t at = 0; at < segment.size();) {
    const std::size_t end =
        spec.pattern == SplitPattern::kNone ? segment.size() : scanner.word_end(at);
    std::string word;
    for (; at < end; ++at) {
      utf8_append(word, byte_level_character(static_cast<unsigned char>(segment[at])));
    }
    words.push_back(std::move(word));
  }
  return words;
}

}  // namespace infllm::engine
