// SPDX-License-Identifier: Apache-2.0
//
// Filters of one value. Those that work on sequences by an attribute or a test are in
// jinja_sequence_filters.cc.
#include "infllm/engine/jinja_filters.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <cstdlib>

#include "infllm/engine/jinja_call.h"
#include "infllm/engine/utf8.h"

namespace infllm::engine::jinja {
namespace {

using Shape = List::Shape;

Result<Value> length(const Call& call) {
  INFLLM_TRY(call.bind({}));
  const Value& value = call.self;
  if (value.is_undefined()) return Value(std::int64_t{0});
  if (const std::string* text = value.string()) {
    if (!call.budget.spend(1, static_cast<std::int64_t>(text->size()))) return call.out_of_budget();
    return Value(utf8_length(*text));
  }
  if (const Dict* dict = value.dict()) return Value(static_cast<std::int64_t>(dict->items.size()));
  const List* list = value.list();
  if (list == nullptr || list->shape == Shape::kGenerator) {
    return call.fail(fmt::format("a {} has no length", value.type_name()));
  }
  return Value(static_cast<std::int64_t>(list->items.size()));
}

Result<Value> default_value(const Call& call) {
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"default_value", "boolean"}));
  const bool replace = call.self.is_undefined() || (truthy(bound[1]) && !truthy(call.self));
  if (!replace) return call.self;
  return call.positional.empty() && bound[0].is_undefined() ? Value(std::string()) : bound[0];
}

// Python's float() of a string, which allows white space around and underscores between digits.
std::optional<double> parse_float(std::string_view text) {
  text = strip(text, nullptr, true, true);
  if (text.starts_with('+') && !text.substr(1).starts_with('-')) text.remove_prefix(1);
  double value = 0;
  const char* end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, value);
  if (parsed.ec != std::errc() || parsed.ptr != end) return std::nullopt;
  return value;
}

std::optional<std::int64_t> parse_integer(std::string_view text, int base) {
  text = strip(text, nullptr, true, true);
  if (text.starts_with('+') && !text.substr(1).starts_with('-')) text.remove_prefix(1);
  std::int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, value, base);
  if (parsed.ec != std::errc() || parsed.ptr != end) return std::nullopt;
  return value;
}

Result<Value> truncated(const Call& call, double value) {
  if (!(std::abs(value) < 9.2e18)) return call.fail("an integer of more than 64 bits");
  return Value(static_cast<std::int64_t>(value));
}

Result<Value> to_int(const Call& call) {
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"default", "base"}));
  const Value fallback = bound[0].is_undefined() ? Value(std::int64_t{0}) : bound[0];
  const std::int64_t base = INFLLM_TRY(call.integer(bound[1], 10));
  if (base < 2 || base > 36) return call.fail("the base must be between 2 and 36");
  if (const std::string* text = call.self.string()) {
    if (const auto i = parse_integer(*text, static_cast<int>(base))) return Value(*i);
    const auto d = parse_float(*text);
    if (!d || !std::isfinite(*d)) return fallback;
    return truncated(call, *d);
  }
  if (const auto i = call.self.integer()) return Value(*i);
  if (call.self.is_float() && std::isfinite(*call.self.number())) {
    return truncated(call, *call.self.number());
  }
  return fallback;
}

Result<Value> to_float(const Call& call) {
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"default"}));
  if (const auto d = call.self.number()) return Value(*d);
  if (const std::string* text = call.self.string()) {
    if (const auto d = parse_float(*text)) return Value(*d);
  }
  return bound[0].is_undefined() ? Value(0.0) : bound[0];
}

Result<Value> absolute(const Call& call) {
  INFLLM_TRY(call.bind({}));
  if (const auto i = call.self.integer()) {
    if (*i == INT64_MIN) return call.fail("an integer of more than 64 bits");
    return Value(*i < 0 ? -*i : *i);
  }
  if (call.self.is_float()) return Value(std::abs(*call.self.number()));
  return call.fail(fmt::format("needs a number, found a {}", call.self.type_name()));
}

Result<Value> round_number(const Call& call) {
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"precision", "method"}));
  const std::int64_t precision = INFLLM_TRY(call.integer(bound[0], 0));
  const std::string method = bound[1].is_undefined() ? "common" : INFLLM_TRY(call.text(bound[1]));
  if (precision < 0 || precision > 15) return call.fail("the precision must be from 0 to 15");
  if (!call.self.is_number()) {
    return call.fail(fmt::format("needs a number, found a {}", call.self.type_name()));
  }
  const double value = *call.self.number();
  if (method == "ceil" || method == "floor") {
    const double scale = std::pow(10.0, static_cast<double>(precision));
    const double scaled = value * scale;
    return Value((method == "ceil" ? std::ceil(scaled) : std::floor(scaled)) / scale);
  }
  if (method != "common") return call.fail("the method must be \"common\", \"ceil\" or \"floor\"");
  if (const auto i = call.self.integer()) return Value(*i);
  if (!std::isfinite(value)) return Value(value);
  // Rounding the decimal expansion is what Python does; halves that binary cannot hold never tie.
  return Value(std::strtod(fmt::format("{:.{}f}", value, precision).c_str(), nullptr));
}

// Jinja's own title: a word begins after a blank, '-', or an opening bracket.
Result<Value> title(const Call& call) {
  INFLLM_TRY(call.bind({}));
  const std::string text = INFLLM_TRY(call.text(call.self));
  std::string out = INFLLM_TRY(change_case(call, text, false));
  bool begins = true;
  for (char& c : out) {
    if (begins && c >= 'a' && c <= 'z') c = static_cast<char>(c - 'a' + 'A');
    begins = std::string_view("-({[< \t\n\r\f\v\x1c\x1d\x1e\x1f").find(c) != std::string_view::npos;
  }
  return Value(std::move(out));
}

Result<Value> to_json(const Call& call) {
  const std::vector<Value> bound =
      INFLLM_TRY(call.bind({"ensure_ascii", "indent", "separators", "sort_keys"}));
  JsonStyle style;
  style.ascii = truthy(bound[0]);
  style.sort_keys = truthy(bound[3]);
  if (!bound[1].is_undefined() && !bound[1].is_none()) {
    style.indent = INFLLM_TRY(call.integer(bound[1], 0));
    if (*style.indent < 0 || *style.indent > 16) return call.fail("indent must be from 0 to 16");
    style.item_separator = ",";
  }
  if (const List* pair = bound[2].list()) {
    if (pair->items.size() != 2 || !pair->items[0].is_string() || !pair->items[1].is_string()) {
      return call.fail("separators must be two strings");
    }
    style.item_separator = *pair->items[0].string();
    style.key_separator = *pair->items[1].string();
  }
  std::string out;
  if (append_json(out, call.self, style, call.budget)) return Value(std::move(out));
  if (call.budget.steps < 0 || call.budget.bytes < 0) return call.out_of_budget();
  return call.fail(
      fmt::format("a {} is or holds something that JSON has no form for", call.self.type_name()));
}

Result<Value> indent(const Call& call) {
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"width", "first", "blank"}));
  std::string pad;
  if (const std::string* text = bound[0].string()) {
    pad = *text;
  } else {
    const std::int64_t width = INFLLM_TRY(call.integer(bound[0], 4));
    if (width < 0 || width > 1000) return call.fail("the width must be from 0 to 1000");
    pad = std::string(static_cast<std::size_t>(width), ' ');
  }
  const std::string text = INFLLM_TRY(call.text(call.self));
  std::string out;
  std::size_t begin = 0;
  for (bool first = true; begin <= text.size(); first = false) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const bool padded = (first ? truthy(bound[1]) : begin < end || truthy(bound[2]));
    if (!call.budget.spend(1, static_cast<std::int64_t>(pad.size() + end - begin))) {
      return call.out_of_budget();
    }
    if (!first) out += '\n';
    if (padded) out += pad;
    out.append(text, begin, end - begin);
    begin = end + 1;
  }
  return Value(std::move(out));
}

Result<Value> trim(const Call& call) {
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"chars"}));
  const std::string text = INFLLM_TRY(call.text(call.self));
  if (!bound[0].is_undefined() && !bound[0].is_none() && !bound[0].is_string()) {
    return call.fail("chars must be a string");
  }
  return Value(std::string(strip(text, bound[0].string(), true, true)));
}

}  // namespace

Result<Value> apply_filter(const Call& call) {
  const std::string& name = call.name;
  if (name == "default" || name == "d") return default_value(call);
  if (name == "length" || name == "count") return length(call);
  if (name == "trim") return trim(call);
  if (name == "tojson") return to_json(call);
  if (name == "int") return to_int(call);
  if (name == "float") return to_float(call);
  if (name == "abs") return absolute(call);
  if (name == "round") return round_number(call);
  if (name == "indent") return indent(call);
  if (name == "title") return title(call);
  if (name == "replace") {
    const std::vector<Value> bound = INFLLM_TRY(call.bind({"old", "new", "count"}));
    const std::string text = INFLLM_TRY(call.text(call.self));
    const std::string from = INFLLM_TRY(call.text(bound[0]));
    const std::string to = INFLLM_TRY(call.text(bound[1]));
    return Value(INFLLM_TRY(replace(call, text, from, to, INFLLM_TRY(call.integer(bound[2], -1)))));
  }
  if (name == "string" || name == "safe" || name == "upper" || name == "lower" ||
      name == "capitalize") {
    INFLLM_TRY(call.bind({}));
    std::string text = INFLLM_TRY(call.text(call.self));
    if (name == "string" || name == "safe") return Value(std::move(text));
    if (name == "capitalize") return Value(INFLLM_TRY(capitalize(call, text)));
    return Value(INFLLM_TRY(change_case(call, text, name == "upper")));
  }
  return apply_sequence_filter(call);
}

}  // namespace infllm::engine::jinja
