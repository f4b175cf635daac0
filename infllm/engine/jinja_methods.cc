// SPDX-License-Identifier: Apache-2.0
//
// Methods of strings, dictionaries and lists. Those that would change their object do not exist:
// the sandbox that templates are written for refuses them too.
#include <algorithm>
#include <array>

#include "infllm/engine/jinja_call.h"
#include "infllm/engine/unicode_tables.h"
#include "infllm/engine/utf8.h"

namespace infllm::engine::jinja {
namespace {

constexpr std::array kStringMethods = {
    "capitalize", "count",      "endswith",     "find",         "isalnum", "isalpha", "isdigit",
    "islower",    "isspace",    "isupper",      "join",         "lower",   "lstrip",  "partition",
    "replace",    "rfind",      "removeprefix", "removesuffix", "rsplit",  "rstrip",  "rpartition",
    "split",      "splitlines", "startswith",   "strip",        "title",   "upper"};
constexpr std::array kDictMethods = {"copy", "get", "items", "keys", "values"};
constexpr std::array kListMethods = {"copy", "count", "index"};
constexpr std::array kLoopMethods = {"changed", "cycle"};

template <typename Names>
bool one_of(const Names& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// A string argument; null when it is undefined or None.
Result<const std::string*> string_argument(const Call& call, const Value& value) {
  if (value.is_undefined() || value.is_none()) return static_cast<const std::string*>(nullptr);
  if (value.string() == nullptr) {
    return call.fail(fmt::format("expected a string, found a {}", value.type_name()));
  }
  return value.string();
}

Result<const std::string*> required_string(const Call& call, const Value& value) {
  const std::string* text = INFLLM_TRY(string_argument(call, value));
  if (text == nullptr) return call.fail("needs a string argument");
  return text;
}

std::vector<std::string_view> split_at_space(std::string_view text, std::int64_t most) {
  std::vector<std::string_view> parts;
  text = strip(text, nullptr, true, false);
  while (!text.empty()) {
    if (most >= 0 && static_cast<std::int64_t>(parts.size()) == most) {
      parts.push_back(text);  // the rest keeps the white space at its end
      break;
    }
    std::size_t end = 0;
    while (end < text.size() && !is_python_space(utf8_at(text, end).code)) {
      end += utf8_at(text, end).bytes;
    }
    parts.push_back(text.substr(0, end));
    text = strip(text.substr(end), nullptr, true, false);
  }
  return parts;
}

std::vector<std::string_view> rsplit_at_space(std::string_view text, std::int64_t most) {
  std::vector<std::string_view> parts;
  text = strip(text, nullptr, false, true);
  while (!text.empty() && (most < 0 || static_cast<std::int64_t>(parts.size()) < most)) {
    std::size_t begin = text.size();
    while (begin > 0) {
      std::size_t before = begin - 1;
      while (before > 0 && (static_cast<unsigned char>(text[before]) & 0xC0) == 0x80) --before;
      if (is_python_space(utf8_at(text, before).code)) break;
      begin = before;
    }
    parts.push_back(text.substr(begin));
    text = strip(text.substr(0, begin), nullptr, false, true);
  }
  if (!strip(text, nullptr, true, false).empty()) parts.push_back(text);
  std::reverse(parts.begin(), parts.end());
  return parts;
}

std::vector<std::string_view> split_at(std::string_view text, std::string_view separator,
                                       std::int64_t most, bool from_right) {
  std::vector<std::string_view> parts;
  while (most < 0 || static_cast<std::int64_t>(parts.size()) < most) {
    const std::size_t hit = from_right ? text.rfind(separator) : text.find(separator);
    if (hit == std::string_view::npos) break;
    const std::string_view rest = text.substr(hit + separator.size());
    parts.push_back(from_right ? rest : text.substr(0, hit));
    text = from_right ? text.substr(0, hit) : rest;
  }
  parts.push_back(text);
  if (from_right) std::reverse(parts.begin(), parts.end());
  return parts;
}

Result<Value> strings(const Call& call, const std::vector<std::string_view>& parts,
                      List::Shape shape = List::Shape::kList) {
  std::vector<Value> items;
  items.reserve(parts.size());
  for (const std::string_view part : parts) {
    if (!call.budget.spend(1, static_cast<std::int64_t>(part.size()))) return call.out_of_budget();
    items.emplace_back(std::string(part));
  }
  return call.list(std::move(items), shape);
}

Result<Value> split(const Call& call, const std::string& text, bool from_right) {
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"sep", "maxsplit"}));
  const std::string* separator = INFLLM_TRY(string_argument(call, bound[0]));
  const std::int64_t most = INFLLM_TRY(call.integer(bound[1], -1));
  if (separator == nullptr) {
    return strings(call, from_right ? rsplit_at_space(text, most) : split_at_space(text, most));
  }
  if (separator->empty()) return call.fail("an empty separator");
  return strings(call, split_at(text, *separator, most, from_right));
}

Result<Value> split_lines(const Call& call, std::string_view text) {
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"keepends"}));
  const bool keep = truthy(bound[0]);
  const auto ends_line = [](char32_t c) {
    return (c >= 0x0A && c <= 0x0D) || (c >= 0x1C && c <= 0x1E) || c == 0x85 || c == 0x2028 ||
           c == 0x2029;
  };
  std::vector<std::string_view> lines;
  std::size_t begin = 0;
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Char c = utf8_at(text, at);
    const std::size_t end = at;
    at += c.bytes;
    if (!ends_line(c.code)) continue;
    if (c.code == '\r' && at < text.size() && text[at] == '\n') ++at;
    lines.push_back(text.substr(begin, (keep ? at : end) - begin));
    begin = at;
  }
  if (begin < text.size()) lines.push_back(text.substr(begin));
  return strings(call, lines);
}

Result<Value> affix(const Call& call, const std::string& text, bool start) {
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"prefix"}));
  const auto matches = [&](const std::string& part) {
    return start ? text.starts_with(part) : text.ends_with(part);
  };
  if (bound[0].string() != nullptr) return Value(matches(*bound[0].string()));
  const List* parts = bound[0].list();
  if (parts == nullptr || parts->shape != List::Shape::kTuple) {
    return call.fail("needs a string or a tuple of strings");
  }
  for (const Value& part : parts->items) {
    if (matches(*INFLLM_TRY(required_string(call, part)))) return Value(true);
  }
  return Value(false);
}

// find, rfind and count, by characters.
Result<Value> search(const Call& call, std::string_view text) {
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"sub"}));
  const std::string& part = *INFLLM_TRY(required_string(call, bound[0]));
  if (!call.budget.spend(1, static_cast<std::int64_t>(text.size()))) return call.out_of_budget();
  if (call.name == "count") {
    if (part.empty()) return Value(utf8_length(text) + 1);
    return Value(static_cast<std::int64_t>(split_at(text, part, -1, false).size()) - 1);
  }
  const std::size_t hit = call.name == "find" ? text.find(part) : text.rfind(part);
  if (hit == std::string_view::npos) return Value(std::int64_t{-1});
  return Value(utf8_length(text.substr(0, hit)));
}

Result<Value> partition(const Call& call, std::string_view text, bool from_right) {
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"sep"}));
  const std::string& separator = *INFLLM_TRY(required_string(call, bound[0]));
  if (separator.empty()) return call.fail("an empty separator");
  const std::vector<std::string_view> parts = split_at(text, separator, 1, from_right);
  using Shape = List::Shape;
  if (parts.size() == 2) return strings(call, {parts[0], separator, parts[1]}, Shape::kTuple);
  if (from_right) return strings(call, {"", "", text}, Shape::kTuple);
  return strings(call, {text, "", ""}, Shape::kTuple);
}

// Upper case at the start of each run of letters, lower case inside.
Result<Value> title(const Call& call, const std::string& text) {
  std::string out = INFLLM_TRY(change_case(call, text, false));
  bool inside = false;
  for (char& c : out) {
    const bool letter = c >= 'a' && c <= 'z';
    if (letter && !inside) c = static_cast<char>(c - 'a' + 'A');
    inside = letter;
  }
  return Value(std::move(out));
}

// isalpha and its kin, of which those about case need ASCII.
Result<Value> classify(const Call& call, const std::string& text) {
  const std::string& name = call.name;
  INFLLM_TRY(call.bind({}));
  bool all = !text.empty(), upper = false, lower = false;
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Char c = utf8_at(text, at);
    at += c.bytes;
    const bool digit = c.code >= '0' && c.code <= '9';
    if (name == "isspace") {
      all &= is_python_space(c.code);
    } else if (name == "isalpha") {
      all &= is_letter(c.code);
    } else if (c.code >= 0x80) {
      return call.fail("is supported for ASCII text only");
    } else if (name == "isdigit") {
      all &= digit;
    } else if (name == "isalnum") {
      all &= digit || is_letter(c.code);
    }
    upper |= c.code >= 'A' && c.code <= 'Z';
    lower |= c.code >= 'a' && c.code <= 'z';
  }
  if (name == "isupper") return Value(upper && !lower);
  if (name == "islower") return Value(lower && !upper);
  return Value(all);
}

Result<Value> string_method(const Call& call, const std::string& text) {
  const std::string& name = call.name;
  if (name == "strip" || name == "lstrip" || name == "rstrip") {
    const std::vector<Value> bound = INFLLM_TRY(call.bind({"chars"}));
    const std::string* characters = INFLLM_TRY(string_argument(call, bound[0]));
    if (!call.budget.spend(1, static_cast<std::int64_t>(text.size()))) return call.out_of_budget();
    return Value(std::string(strip(text, characters, name != "rstrip", name != "lstrip")));
  }
  if (name == "split" || name == "rsplit") return split(call, text, name == "rsplit");
  if (name == "splitlines") return split_lines(call, text);
  if (name == "startswith" || name == "endswith") return affix(call, text, name == "startswith");
  if (name == "find" || name == "rfind" || name == "count") return search(call, text);
  if (name == "partition" || name == "rpartition") {
    return partition(call, text, name == "rpartition");
  }
  if (name == "replace") {
    const std::vector<Value> bound = INFLLM_TRY(call.bind({"old", "new", "count"}));
    const std::string& from = *INFLLM_TRY(required_string(call, bound[0]));
    const std::string& to = *INFLLM_TRY(required_string(call, bound[1]));
    const std::int64_t most = INFLLM_TRY(call.integer(bound[2], -1));
    return Value(INFLLM_TRY(replace(call, text, from, to, most)));
  }
  if (name == "removeprefix" || name == "removesuffix") {
    const std::vector<Value> bound = INFLLM_TRY(call.bind({"affix"}));
    const std::string& part = *INFLLM_TRY(required_string(call, bound[0]));
    if (name == "removeprefix") {
      return text.starts_with(part) ? Value(text.substr(part.size())) : call.self;
    }
    return text.ends_with(part) ? Value(text.substr(0, text.size() - part.size())) : call.self;
  }
  if (name == "join") {
    const std::vector<Value> bound = INFLLM_TRY(call.bind({"iterable"}));
    std::string out;
    bool first = true;
    for (const Value& part : INFLLM_TRY(call.items(bound[0]))) {
      if (!first) out += text;
      first = false;
      out += *INFLLM_TRY(required_string(call, part));
      if (!call.budget.spend(1, static_cast<std::int64_t>(out.size() / 16 + text.size()))) {
        return call.out_of_budget();
      }
    }
    return Value(std::move(out));
  }
  if (name.starts_with("is")) return classify(call, text);
  INFLLM_TRY(call.bind({}));
  if (name == "upper" || name == "lower") {
    return Value(INFLLM_TRY(change_case(call, text, name == "upper")));
  }
  if (name == "capitalize") return Value(INFLLM_TRY(capitalize(call, text)));
  return title(call, text);
}

Result<Value> dict_method(const Call& call, const Dict& dict) {
  if (call.name == "get") {
    const std::vector<Value> bound = INFLLM_TRY(call.bind({"key", "default"}));
    const Value* found = bound[0].string() == nullptr ? nullptr : dict.find(*bound[0].string());
    if (found != nullptr) return *found;
    const bool given = call.positional.size() + call.named.size() > 1;
    return given ? bound[1] : Value(None());
  }
  INFLLM_TRY(call.bind({}));
  if (call.name == "copy") return call.self;
  std::vector<Value> items;
  for (const auto& [key, value] : dict.items) {
    if (call.name == "keys") items.emplace_back(key);
    if (call.name == "values") items.push_back(value);
    if (call.name == "items") {
      items.push_back(INFLLM_TRY(call.list({Value(key), value}, List::Shape::kTuple)));
    }
  }
  return call.list(std::move(items), List::Shape::kView);
}

Result<Value> list_method(const Call& call, const List& list) {
  if (call.name == "copy") return call.self;
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"value"}));
  std::int64_t count = 0;
  for (std::size_t i = 0; i < list.items.size(); ++i) {
    if (!INFLLM_TRY(call.is_equal(list.items[i], bound[0]))) continue;
    if (call.name == "index") return Value(static_cast<std::int64_t>(i));
    ++count;
  }
  if (call.name == "index") return call.fail("no such item in the list");
  return Value(count);
}

Result<Value> loop_method(const Call& call, Loop& loop) {
  if (call.name == "cycle") {
    if (call.positional.empty()) return call.fail("no items to cycle through");
    return call.positional[static_cast<std::size_t>(loop.index0) % call.positional.size()];
  }
  const Value now = INFLLM_TRY(call.list(call.positional));
  const bool same = loop.last_changed && INFLLM_TRY(call.is_equal(*loop.last_changed, now));
  if (!same) loop.last_changed = now;
  return Value(!same);
}

}  // namespace

bool has_method(const Value& value, std::string_view name) {
  if (value.string() != nullptr) return one_of(kStringMethods, name);
  if (value.dict() != nullptr) return one_of(kDictMethods, name);
  if (value.loop() != nullptr) return one_of(kLoopMethods, name);
  const List* list = value.list();
  return list != nullptr && one_of(kListMethods, name) &&
         (list->shape == List::Shape::kList ||
          (list->shape == List::Shape::kTuple && name != "copy"));
}

Result<Value> call_method(const Call& call) {
  if (call.self.string() != nullptr) return string_method(call, *call.self.string());
  if (call.self.dict() != nullptr) return dict_method(call, *call.self.dict());
  if (call.self.loop() != nullptr) return loop_method(call, *call.self.loop());
  return list_method(call, *call.self.list());
}

}  // namespace infllm::engine::jinja
