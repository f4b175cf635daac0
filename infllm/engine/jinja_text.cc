// SPDX-License-Identifier: Apache-2.0
//
// The texts of values: str(), repr() and json.dumps() of Python.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "infllm/engine/jinja_value.h"
#include "infllm/engine/unicode_tables.h"
#include "infllm/engine/utf8.h"

namespace infllm::engine::jinja {
namespace {

bool append(std::string& out, std::string_view text, Budget& budget) {
  if (!budget.spend(0, static_cast<std::int64_t>(text.size()))) return false;
  out += text;
  return true;
}

std::string string_repr(std::string_view text) {
  const bool has_single = text.find('\'') != std::string_view::npos;
  const bool has_double = text.find('"') != std::string_view::npos;
  const char quote = has_single && !has_double ? '"' : '\'';
  std::string out(1, quote);
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Char c = utf8_at(text, at);
    if (c.code == static_cast<char32_t>(quote) || c.code == '\\') {
      out += '\\';
      out += static_cast<char>(c.code);
    } else if (c.code == '\n') {
      out += "\\n";
    } else if (c.code == '\r') {
      out += "\\r";
    } else if (c.code == '\t') {
      out += "\\t";
    } else if (is_printable(c.code)) {
      utf8_append(out, c.code);
    } else {
      const auto code = static_cast<std::uint32_t>(c.code);
      out += code < 0x100     ? fmt::format("\\x{:02x}", code)
             : code < 0x10000 ? fmt::format("\\u{:04x}", code)
                              : fmt::format("\\U{:08x}", code);
    }
    at += c.bytes;
  }
  return out += quote;
}

std::string json_string(std::string_view text, bool ascii) {
  std::string out = "\"";
  const auto escape = [&](std::uint32_t code) { out += fmt::format("\\u{:04x}", code); };
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Char c = utf8_at(text, at);
    const auto code = static_cast<std::uint32_t>(c.code);
    switch (code) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\f':
        out += "\\f";
        break;
      case '\b':
        out += "\\b";
        break;
      default:
        if (code < 0x20 || (ascii && code >= 0x7F && code < 0x10000)) {
          escape(code);
        } else if (ascii && code >= 0x10000) {
          escape(0xD800 + ((code - 0x10000) >> 10));
          escape(0xDC00 + ((code - 0x10000) & 0x3FF));
        } else {
          utf8_append(out, c.code);
        }
    }
    at += c.bytes;
  }
  return out += '"';
}

bool append_items(std::string& out, const std::vector<Value>& items, Budget& budget) {
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (i > 0 && !append(out, ", ", budget)) return false;
    if (!append_repr(out, items[i], budget)) return false;
  }
  return true;
}

class JsonWriter {
 public:
  JsonWriter(std::string& out, const JsonStyle& style, Budget& budget)
      : out_(out), style_(style), budget_(budget) {}

  bool write(const Value& value, int level) {
    if (!budget_.spend(1)) return false;
    if (value.is_none()) return put("null");
    if (value.is_bool()) return put(truthy(value) ? "true" : "false");
    if (value.is_int()) return put(fmt::format("{}", *value.integer()));
    if (value.is_float()) return put(number(*value.number()));
    if (const std::string* text = value.string()) return put(json_string(*text, style_.ascii));
    if (const List* list = value.list()) return write_list(*list, level);
    if (const Dict* dict = value.dict()) return write_dict(*dict, level);
    return false;
  }

 private:
  bool put(std::string_view text) { return append(out_, text, budget_); }
  bool new_line(int level) {
    if (!style_.indent) return true;
    return put("\n" + std::string(static_cast<std::size_t>(level * *style_.indent), ' '));
  }
  static std::string number(double d) {
    if (std::isnan(d)) return "NaN";
    if (std::isinf(d)) return d > 0 ? "Infinity" : "-Infinity";
    return float_repr(d);
  }
  bool write_list(const List& list, int level) {
    if (list.shape == List::Shape::kView || list.shape == List::Shape::kGenerator) return false;
    if (list.items.empty()) return put("[]");
    if (!put("[")) return false;
    for (std::size_t i = 0; i < list.items.size(); ++i) {
      if (i > 0 && !put(style_.item_separator)) return false;
      if (!new_line(level + 1) || !write(list.items[i], level + 1)) return false;
    }
    return new_line(level) && put("]");
  }
  bool write_dict(const Dict& dict, int level) {
    if (dict.items.empty()) return put("{}");
    std::vector<const std::pair<std::string, Value>*> items;
    for (const auto& item : dict.items) items.push_back(&item);
    if (style_.sort_keys) {
      std::sort(items.begin(), items.end(), [](auto* a, auto* b) { return a->first < b->first; });
    }
    if (!put("{")) return false;
    for (std::size_t i = 0; i < items.size(); ++i) {
      if (i > 0 && !put(style_.item_separator)) return false;
      if (!new_line(level + 1) || !put(json_string(items[i]->first, style_.ascii)) ||
          !put(style_.key_separator) || !write(items[i]->second, level + 1)) {
        return false;
      }
    }
    return new_line(level) && put("}");
  }

  std::string& out_;
  const JsonStyle& style_;
  Budget& budget_;
};

}  // namespace

std::string float_repr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  char text[64];
  const auto scientific =
      std::to_chars(text, text + sizeof text, value, std::chars_format::scientific);
  const std::string_view digits(text, static_cast<std::size_t>(scientific.ptr - text));
  const std::size_t e = digits.find('e');
  int exponent = 0;
  const char* after = digits.data() + e + (digits[e + 1] == '+' ? 2 : 1);
  std::from_chars(after, digits.data() + digits.size(), exponent);
  if (exponent < -4 || exponent >= 16) return std::string(digits);
  const auto fixed = std::to_chars(text, text + sizeof text, value, std::chars_format::fixed);
  std::string out(text, fixed.ptr);
  if (out.find('.') == std::string::npos) out += ".0";
  return out;
}

bool append_str(std::string& out, const Value& value, Budget& budget) {
  if (value.is_undefined()) return true;
  if (const std::string* text = value.string()) return append(out, *text, budget);
  return append_repr(out, value, budget);
}

bool append_repr(std::string& out, const Value& value, Budget& budget) {
  if (!budget.spend(1)) return false;
  if (value.is_undefined()) return append(out, "Undefined", budget);
  if (value.is_none()) return append(out, "None", budget);
  if (value.is_bool()) return append(out, truthy(value) ? "True" : "False", budget);
  if (value.is_int()) return append(out, fmt::format("{}", *value.integer()), budget);
  if (value.is_float()) return append(out, float_repr(*value.number()), budget);
  if (const std::string* text = value.string()) {
    if (!budget.spend(0, static_cast<std::int64_t>(text->size()))) return false;
    return append(out, string_repr(*text), budget);
  }
  if (const List* list = value.list()) {
    using Shape = List::Shape;
    if (list->shape == Shape::kView || list->shape == Shape::kGenerator) return false;
    const bool tuple = list->shape == Shape::kTuple;
    return append(out, tuple ? "(" : "[", budget) && append_items(out, list->items, budget) &&
           append(out, tuple ? (list->items.size() == 1 ? ",)" : ")") : "]", budget);
  }
  if (const Dict* dict = value.dict()) {
    if (!append(out, "{", budget)) return false;
    for (std::size_t i = 0; i < dict->items.size(); ++i) {
      const auto& [key, item] = dict->items[i];
      if ((i > 0 && !append(out, ", ", budget)) || !append(out, string_repr(key), budget) ||
          !append(out, ": ", budget) || !append_repr(out, item, budget)) {
        return false;
      }
    }
    return append(out, "}", budget);
  }
  return false;
}

bool append_json(std::string& out, const Value& value, const JsonStyle& style, Budget& budget) {
  return JsonWriter(out, style, budget).write(value, 0);
}

}  // namespace infllm::engine::jinja
