// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/jinja_lexer.h"

#include <fmt/format.h>

#include <algorithm>

#include "infllm/engine/unicode_tables.h"
#include "infllm/engine/utf8.h"

namespace infllm::engine::jinja {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool starts_name(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
bool is_name(char c) { return starts_name(c) || is_digit(c); }
int hex_digit(char c) {
  return is_digit(c)            ? c - '0'
         : c >= 'a' && c <= 'f' ? c - 'a' + 10
         : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                : -1;
}

std::string normalize_newlines(std::string_view source) {
  std::string out;
  for (std::size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      out += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    } else {
      out += source[i];
    }
  }
  if (out.ends_with('\n')) out.pop_back();
  return out;
}

std::string_view without_trailing_space(std::string_view text) {
  std::size_t end = 0;
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Char c = utf8_at(text, at);
    at += c.bytes;
    if (!is_python_space(c.code)) end = at;
  }
  return text.substr(0, end);
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : text_(source) {}

  Result<std::vector<Token>> run() {
    while (at_ < text_.size()) INFLLM_TRY(next_text());
    tokens_.push_back({Token::Kind::kEnd, "", line_});
    return std::move(tokens_);
  }

 private:
  Status fail(std::string_view reason) const { return template_error(line_, reason); }

  void advance(std::size_t to) {
    line_ += static_cast<int>(std::count(text_.begin() + at_, text_.begin() + to, '\n'));
    at_ = to;
  }
  void skip_space() {
    std::size_t to = at_;
    while (to < text_.size() && is_python_space(utf8_at(text_, to).code)) {
      to += utf8_at(text_, to).bytes;
    }
    advance(to);
  }
  bool at(std::string_view what) const { return text_.substr(at_).starts_with(what); }

  // Text up to the next tag, then the tag.
  Status next_text() {
    std::size_t tag = at_;
    const auto is_tag = [&](std::size_t i) {
      return text_[i] == '{' && i + 1 < text_.size() &&
             (text_[i + 1] == '{' || text_[i + 1] == '%' || text_[i + 1] == '#');
    };
    while (tag < text_.size() && !is_tag(tag)) ++tag;
    std::string_view data = text_.substr(at_, tag - at_);
    const bool line_start = line_start_;
    if (tag == text_.size()) {
      put_text(data);
      advance(tag);
      return {};
    }
    const char kind = text_[tag + 1];
    const char sign = tag + 2 < text_.size() ? text_[tag + 2] : '\0';
    data = strip_before(data, sign, kind != '{', line_start);
    put_text(data);
    advance(tag + 2 + (sign == '-' || sign == '+' ? 1 : 0));
    if (kind == '#') return comment();
    if (kind == '%' && raw_begin()) return raw();
    const bool print = kind == '{';
    tokens_.push_back({print ? Token::Kind::kPrintBegin : Token::Kind::kBlockBegin, "", line_});
    return expression(print);
  }

  // What '-' strips before a tag, or lstrip_blocks does before one that prints nothing.
  static std::string_view strip_before(std::string_view data, char sign, bool block,
                                       bool line_start) {
    if (sign == '-') return without_trailing_space(data);
    if (sign == '+' || !block) return data;
    const std::size_t newline = data.rfind('\n');
    const std::size_t start = newline == std::string_view::npos ? 0 : newline + 1;
    if (start == 0 && !line_start) return data;
    const bool blank = without_trailing_space(data.substr(start)).empty();
    return blank ? data.substr(0, start) : data;
  }

  void put_text(std::string_view data) {
    if (!data.empty()) tokens_.push_back({Token::Kind::kText, std::string(data), line_});
  }

  // The end of a tag at the current place: '-' strips all white space after it, else a statement or
  // comment takes one newline unless '+' keeps it. False when there is no end here.
  bool tag_end(std::string_view end, bool trim) {
    const bool minus =
        at_ < text_.size() && text_[at_] == '-' && text_.substr(at_ + 1).starts_with(end);
    const bool plus =
        trim && at_ < text_.size() && text_[at_] == '+' && text_.substr(at_ + 1).starts_with(end);
    if (!minus && !plus && !at(end)) return false;
    const std::size_t start = at_;
    advance(at_ + end.size() + (minus || plus ? 1 : 0));
    if (minus) skip_space();
    if (!minus && !plus && trim && at("\n")) advance(at_ + 1);
    line_start_ = text_[at_ - 1] == '\n' && at_ > start;
    return true;
  }

  Status comment() {
    for (; at_ < text_.size(); advance(at_ + 1)) {
      if (tag_end("#}", true)) return {};
    }
    return fail("a comment {# is never closed");
  }

  // "raw %}" after an opening tag.
  bool raw_begin() {
    const std::size_t at = at_;
    const int line = line_;
    skip_space();
    if (this->at("raw")) {
      advance(at_ + 3);
      skip_space();
      if (tag_end("%}", false)) return true;
    }
    at_ = at;
    line_ = line;
    return false;
  }

  Status raw() {
    const std::size_t begin = at_;
    const bool line_start = line_start_;
    for (std::size_t tag = at_; (tag = text_.find("{%", tag)) != std::string_view::npos; tag += 2) {
      const int line = line_;
      const std::size_t back = at_;
      const char sign = tag + 2 < text_.size() ? text_[tag + 2] : '\0';
      advance(tag + 2 + (sign == '-' || sign == '+' ? 1 : 0));
      skip_space();
      if (at("endraw")) {
        advance(at_ + 6);
        skip_space();
        if (tag_end("%}", true)) {
          put_text(strip_before(text_.substr(begin, tag - begin), sign, true, line_start));
          return {};
        }
      }
      at_ = back;
      line_ = line;
    }
    return fail("{% raw %} is never closed");
  }

  Status expression(bool print) {
    std::vector<char> brackets;  // inside of them an end tag is not one
    while (true) {
      skip_space();
      if (at_ >= text_.size()) {
        return fail(print ? "{{ is never closed" : "{% is never closed");
      }
      if (brackets.empty() && tag_end(print ? "}}" : "%}", !print)) {
        tokens_.push_back({print ? Token::Kind::kPrintEnd : Token::Kind::kBlockEnd, "", line_});
        return {};
      }
      const char c = text_[at_];
      if (starts_name(c)) {
        std::size_t to = at_;
        while (to < text_.size() && is_name(text_[to])) ++to;
        put(Token::Kind::kName, to);
      } else if (is_digit(c)) {
        INFLLM_TRY(number());
      } else if (c == '\'' || c == '"') {
        INFLLM_TRY(string(c));
      } else {
        INFLLM_TRY(operation(brackets));
      }
    }
  }

  void put(Token::Kind kind, std::size_t to) {
    tokens_.push_back({kind, std::string(text_.substr(at_, to - at_)), line_});
    advance(to);
  }

  Status number() {
    // After a dot it is an index: x.0.1
    const bool index = at_ > 0 && text_[at_ - 1] == '.';
    const auto digits_from = [&](std::size_t i) {
      while (i < text_.size() && is_digit(text_[i])) ++i;
      return i;
    };
    std::size_t to = digits_from(at_);
    bool is_float = false;
    if (!index && to + 1 < text_.size() && text_[to] == '.' && is_digit(text_[to + 1])) {
      is_float = true;
      to = digits_from(to + 1);
    }
    if (!index && to < text_.size() && (text_[to] == 'e' || text_[to] == 'E')) {
      std::size_t power = to + 1;
      if (power < text_.size() && (text_[power] == '+' || text_[power] == '-')) ++power;
      if (power < text_.size() && is_digit(text_[power])) {
        is_float = true;
        to = digits_from(power);
      }
    }
    const bool zeros = !is_float && text_[at_] == '0' && to > at_ + 1;
    if (zeros || (to < text_.size() && is_name(text_[to]))) {
      return fail("a number that is neither decimal nor a float");
    }
    put(is_float ? Token::Kind::kFloat : Token::Kind::kInteger, to);
    return {};
  }

  Status string(char quote) {
    const int line = line_;
    std::string value;
    std::size_t i = at_ + 1;
    for (; i < text_.size() && text_[i] != quote; ++i) {
      if (text_[i] != '\\') {
        value += text_[i];
        continue;
      }
      if (++i == text_.size()) break;
      INFLLM_TRY(escape(i, value));
    }
    if (i >= text_.size()) return fail("a string is never closed");
    advance(i + 1);
    tokens_.push_back({Token::Kind::kString, std::move(value), line});
    return {};
  }

  // What follows a backslash at text_[i]; leaves i at its last character.
  Status escape(std::size_t& i, std::string& value) {
    constexpr std::string_view kFrom = "\\'\"abfnrtv", kTo = "\\'\"\a\b\f\n\r\t\v";
    const char c = text_[i];
    if (const std::size_t simple = kFrom.find(c); simple != std::string_view::npos) {
      value += kTo[simple];
      return {};
    }
    if (c == '\n') return {};  // a line continued
    char32_t code = 0;
    if (c >= '0' && c <= '7') {
      std::size_t end = i;
      while (end < i + 3 && end < text_.size() && text_[end] >= '0' && text_[end] <= '7') {
        code = code * 8 + static_cast<char32_t>(text_[end++] - '0');
      }
      i = end - 1;
      utf8_append(value, code);
      return {};
    }
    const int digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    if (digits == 0) {
      if (c == 'N') return fail("\\N{...} in a string is not supported");
      value += '\\';
      value += c;
      return {};
    }
    for (int d = 0; d < digits; ++d) {
      const int digit = i + 1 < text_.size() ? hex_digit(text_[i + 1]) : -1;
      if (digit < 0) return fail(fmt::format("\\{} needs {} hexadecimal digits", c, digits));
      code = code * 16 + static_cast<char32_t>(digit);
      ++i;
    }
    if (code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) {
      return fail(fmt::format("\\{} names no character", c));
    }
    utf8_append(value, code);
    return {};
  }

  Status operation(std::vector<char>& brackets) {
    constexpr std::string_view kDouble[] = {"//", "**", "==", "!=", ">=", "<="};
    for (const std::string_view op : kDouble) {
      if (!at(op)) continue;
      put(Token::Kind::kOperator, at_ + 2);
      return {};
    }
    const char c = text_[at_];
    if (std::string_view("+-/*%~[](){}><=.:|,").find(c) == std::string_view::npos) {
      return fail(
          fmt::format("unexpected character '{}'", text_.substr(at_, utf8_at(text_, at_).bytes)));
    }
    if (c == '(' || c == '[' || c == '{') brackets.push_back(c == '(' ? ')' : c == '[' ? ']' : '}');
    if (c == ')' || c == ']' || c == '}') {
      if (brackets.empty() || brackets.back() != c) return fail(fmt::format("unexpected '{}'", c));
      brackets.pop_back();
    }
    put(Token::Kind::kOperator, at_ + 1);
    return {};
  }

  std::string_view text_;
  std::size_t at_ = 0;
  int line_ = 1;
  bool line_start_ = true;  // the tag before ended with a newline, or there was none
  std::vector<Token> tokens_;
};

}  // namespace

Status template_error(int line, std::string_view reason) {
  return data_error(fmt::format("chat template line {}: {}", line, reason));
}

Result<std::vector<Token>> lex(std::string_view source) {
  if (!utf8_valid(source)) return data_error("chat template: not UTF-8");
  const std::string text = normalize_newlines(source);
  return Lexer(text).run();
}

}  // namespace infllm::engine::jinja
