// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/jinja_call.h"

#include <algorithm>

#include "infllm/engine/jinja_lexer.h"
#include "infllm/engine/unicode_tables.h"
#include "infllm/engine/utf8.h"

namespace infllm::engine::jinja {
namespace {

// Byte offset of each character, and the size at the end.
std::vector<std::size_t> character_offsets(std::string_view text) {
  std::vector<std::size_t> offsets;
  for (std::size_t at = 0; at < text.size(); at += utf8_at(text, at).bytes) offsets.push_back(at);
  offsets.push_back(text.size());
  return offsets;
}

Value loop_attribute(const Loop& loop, std::string_view name) {
  const auto length = static_cast<std::int64_t>(loop.items.size());
  const std::int64_t i = loop.index0;
  if (name == "index") return i + 1;
  if (name == "index0") return i;
  if (name == "revindex") return length - i;
  if (name == "revindex0") return length - i - 1;
  if (name == "first") return i == 0;
  if (name == "last") return i == length - 1;
  if (name == "length") return length;
  if (name == "depth") return std::int64_t{1};  // only recursive loops go deeper
  if (name == "depth0") return std::int64_t{0};
  if (name == "previtem") return i > 0 ? loop.items[i - 1] : Value();
  if (name == "nextitem") return i + 1 < length ? loop.items[i + 1] : Value();
  return {};
}

}  // namespace

Status Call::fail(std::string_view reason) const {
  return template_error(line,
                        name.empty() ? std::string(reason) : fmt::format("{}: {}", name, reason));
}

Status Call::out_of_budget() const {
  return template_error(line, "rendering needs more steps or memory than its budget allows");
}

Result<std::vector<Value>> Call::bind(std::initializer_list<std::string_view> parameters) const {
  if (positional.size() > parameters.size()) {
    return fail(
        fmt::format("{} arguments, expected at most {}", positional.size(), parameters.size()));
  }
  std::vector<Value> bound(positional);
  bound.resize(parameters.size());
  for (const auto& [key, value] : named) {
    const auto* found = std::find(parameters.begin(), parameters.end(), key);
    const auto place = static_cast<std::size_t>(found - parameters.begin());
    if (found == parameters.end()) return fail(fmt::format("unknown argument \"{:.32}\"", key));
    if (place < positional.size()) return fail(fmt::format("argument \"{}\" given twice", key));
    bound[place] = value;
  }
  return bound;
}

Result<std::string> Call::text(const Value& value) const {
  std::string out;
  if (append_str(out, value, budget)) return out;
  if (budget.steps < 0 || budget.bytes < 0) return out_of_budget();
  return fail(fmt::format("a {} has no text", value.type_name()));
}

Result<std::vector<Value>> Call::items(const Value& value) const {
  std::vector<Value> out;
  if (const List* list = value.list()) {
    out = list->items;
  } else if (const Dict* dict = value.dict()) {
    for (const auto& [key, unused] : dict->items) out.emplace_back(key);
  } else if (const std::string* text = value.string()) {
    if (!budget.spend(static_cast<std::int64_t>(text->size()))) return out_of_budget();
    for (std::size_t at = 0; at < text->size();) {
      const std::size_t bytes = utf8_at(*text, at).bytes;
      out.emplace_back(text->substr(at, bytes));
      at += bytes;
    }
  } else if (const Loop* loop = value.loop()) {
    out = loop->items;
  } else if (!value.is_undefined()) {
    return fail(fmt::format("a {} cannot be iterated over", value.type_name()));
  }
  const auto count = static_cast<std::int64_t>(out.size());
  if (!budget.spend(count, count * std::int64_t{sizeof(Value)})) return out_of_budget();
  return out;
}

Result<Value> Call::list(std::vector<Value> values, List::Shape shape) const {
  const auto count = static_cast<std::int64_t>(values.size());
  if (!budget.spend(count, count * std::int64_t{sizeof(Value)})) return out_of_budget();
  std::optional<Value> made = make_list(std::move(values), shape);
  if (made) return std::move(*made);
  return fail(fmt::format("a list holds plain data only, at most {} levels deep", kMaxValueDepth));
}

Result<std::int64_t> Call::integer(const Value& value, std::int64_t fallback) const {
  if (value.is_undefined() || value.is_none()) return fallback;
  if (const auto i = value.integer()) return *i;
  return fail(fmt::format("expected an integer, found a {}", value.type_name()));
}

Result<bool> Call::is_equal(const Value& a, const Value& b) const {
  const std::optional<bool> same = equal(a, b, budget);
  return same ? Result<bool>(*same) : out_of_budget();
}

Result<bool> Call::is_less(const Value& a, const Value& b) const {
  const std::optional<bool> before = less(a, b, budget);
  if (before) return *before;
  if (budget.steps < 0) return out_of_budget();
  return fail(fmt::format("a {} and a {} have no order", a.type_name(), b.type_name()));
}

Result<bool> Call::contains(const Value& container, const Value& wanted) const {
  if (const std::string* text = container.string()) {
    const std::string* part = wanted.string();
    if (part == nullptr) {
      return fail(fmt::format("a string contains strings, not a {}", wanted.type_name()));
    }
    if (!budget.spend(1 + static_cast<std::int64_t>(text->size() / 64))) return out_of_budget();
    return text->find(*part) != std::string::npos;
  }
  if (const Dict* dict = container.dict()) {
    return wanted.string() != nullptr && dict->find(*wanted.string()) != nullptr;
  }
  const std::vector<Value>* all = nullptr;
  if (const List* values = container.list()) all = &values->items;
  if (all == nullptr && container.is_undefined()) return false;
  if (all == nullptr) return fail(fmt::format("a {} contains nothing", container.type_name()));
  for (const Value& value : *all) {
    if (INFLLM_TRY(is_equal(value, wanted))) return true;
  }
  return false;
}

Result<Value> attribute(const Call& call, const Value& value, const std::string& name) {
  if (const Loop* loop = value.loop()) {
    const Value found = loop_attribute(*loop, name);
    if (!found.is_undefined()) return found;
  }
  if (has_method(value, name)) {
    return Value(std::make_shared<const Function>(Function{.name = name, .self = value}));
  }
  if (const Namespace* space = value.name_space()) {
    const auto found = space->values.find(name);
    if (found != space->values.end()) return found->second;
  }
  if (const Dict* dict = value.dict()) {
    if (const Value* found = dict->find(name)) return *found;
  }
  if (!call.budget.spend(1)) return call.out_of_budget();
  return Value(Undefined{std::make_shared<const std::string>(
      fmt::format("{} object has no attribute '{:.64}'", value.type_name(), name))});
}

Result<Value> item(const Call& call, const Value& value, const Value& key) {
  const std::string* name = key.string();
  if (name != nullptr) {
    if (const Dict* dict = value.dict()) {
      if (const Value* found = dict->find(*name)) return *found;
    }
    return attribute(call, value, *name);
  }
  std::optional<std::int64_t> index = key.integer();
  if (index && value.list() != nullptr) {
    const std::vector<Value>& items = value.list()->items;
    const auto count = static_cast<std::int64_t>(items.size());
    const bool indexable =
        value.list()->shape == List::Shape::kList || value.list()->shape == List::Shape::kTuple;
    if (*index < 0) *index += count;
    if (indexable && *index >= 0 && *index < count) return items[*index];
  }
  if (index && value.string() != nullptr) {
    const std::string& text = *value.string();
    if (!call.budget.spend(static_cast<std::int64_t>(text.size() / 64))) {
      return call.out_of_budget();
    }
    if (*index < 0) *index += utf8_length(text);
    std::size_t at = 0;
    for (std::int64_t i = 0; *index >= 0 && at < text.size(); ++i) {
      const std::size_t bytes = utf8_at(text, at).bytes;
      if (i == *index) return Value(text.substr(at, bytes));
      at += bytes;
    }
  }
  return Value(Undefined{std::make_shared<const std::string>(
      fmt::format("{} object has no such element", value.type_name()))});
}

Result<Value> attribute_path(const Call& call, const Value& value, const Value& path) {
  if (path.integer()) return item(call, value, path);
  if (path.string() == nullptr) return call.fail("an attribute is a string or an integer");
  Value current = value;
  const std::string& text = *path.string();
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find('.', begin), text.size());
    const std::string part = text.substr(begin, end - begin);
    const bool digits =
        !part.empty() && part.size() < 10 &&
        std::all_of(part.begin(), part.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (current.is_undefined()) return call.fail("an attribute of something undefined");
    current = INFLLM_TRY(
        item(call, current, digits ? Value(std::int64_t{std::stol(part)}) : Value(part)));
    begin = end + 1;
  }
  return current;
}

Result<Value> slice(const Call& call, const Value& value, const Slice& bounds) {
  const std::string* text = value.string();
  const List* list = value.list();
  if (text == nullptr && (list == nullptr || list->shape == List::Shape::kView ||
                          list->shape == List::Shape::kGenerator)) {
    if (value.is_undefined()) return call.fail("a slice of something undefined");
    return Value();  // Jinja turns the TypeError into undefined
  }
  std::vector<std::size_t> offsets;
  if (text != nullptr) {
    if (!call.budget.spend(1, static_cast<std::int64_t>(text->size()) * 8)) {
      return call.out_of_budget();
    }
    offsets = character_offsets(*text);
  }
  const auto count =
      static_cast<std::int64_t>(text != nullptr ? offsets.size() - 1 : list->items.size());
  const std::int64_t step = bounds.step.value_or(1);
  if (step == 0) return call.fail("slice step cannot be zero");
  const auto clamp = [&](std::optional<std::int64_t> bound, std::int64_t fallback) {
    if (!bound) return fallback;
    const std::int64_t low = step > 0 ? 0 : -1, high = step > 0 ? count : count - 1;
    const std::int64_t at = *bound < 0 ? *bound + count : *bound;
    return std::clamp(at, low, std::max(low, high));
  };
  std::int64_t at = clamp(bounds.start, step > 0 ? 0 : count - 1);
  const std::int64_t stop = clamp(bounds.stop, step > 0 ? count : -1);
  if (text != nullptr && step == 1) {
    return Value(at < stop ? text->substr(offsets[at], offsets[stop] - offsets[at])
                           : std::string());
  }
  std::string characters;
  std::vector<Value> items;
  while (step > 0 ? at < stop : at > stop) {
    if (text != nullptr) {
      characters.append(*text, offsets[at], offsets[at + 1] - offsets[at]);
    } else {
      items.push_back(list->items[at]);
    }
    if (step > count || step < -count) break;  // the next one is outside, and might overflow
    at += step;
  }
  if (text != nullptr) return Value(std::move(characters));
  return call.list(std::move(items), list->shape);
}

std::string_view strip(std::string_view text, const std::string* characters, bool left,
                       bool right) {
  const auto drops = [&](std::string_view c) {
    if (characters == nullptr) return is_python_space(utf8_at(c, 0).code);
    for (std::size_t at = 0; at < characters->size(); at += utf8_at(*characters, at).bytes) {
      if (c == std::string_view(*characters).substr(at, utf8_at(*characters, at).bytes))
        return true;
    }
    return false;
  };
  while (left && !text.empty()) {
    const std::size_t bytes = utf8_at(text, 0).bytes;
    if (!drops(text.substr(0, bytes))) break;
    text.remove_prefix(bytes);
  }
  while (right && !text.empty()) {
    std::size_t begin = text.size() - 1;
    while (begin > 0 && (static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80) --begin;
    if (!drops(text.substr(begin))) break;
    text.remove_suffix(text.size() - begin);
  }
  return text;
}

Result<std::string> change_case(const Call& call, std::string_view text, bool upper) {
  std::string out(text);
  for (char& c : out) {
    if (static_cast<unsigned char>(c) >= 0x80) {
      return call.fail("changing case is supported for ASCII text only");
    }
    if (upper && c >= 'a' && c <= 'z') c = static_cast<char>(c - 'a' + 'A');
    if (!upper && c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  if (!call.budget.spend(1, static_cast<std::int64_t>(out.size()))) return call.out_of_budget();
  return out;
}

Result<std::string> capitalize(const Call& call, std::string_view text) {
  std::string out = INFLLM_TRY(change_case(call, text.substr(0, 1), true));
  return out + INFLLM_TRY(change_case(call, text.substr(text.empty() ? 0 : 1), false));
}

Result<std::string> replace(const Call& call, std::string_view text, std::string_view from,
                            std::string_view to, std::int64_t most) {
  std::string out;
  std::size_t at = 0;
  // An empty pattern matches before every character and at the end, as in Python.
  while (most != 0) {
    const std::size_t hit = text.find(from, at);
    if (hit == std::string_view::npos) break;
    if (!call.budget.spend(1, static_cast<std::int64_t>(to.size() + hit - at))) {
      return call.out_of_budget();
    }
    out.append(text, at, hit - at).append(to);
    at = hit + from.size();
    if (most > 0) --most;
    if (!from.empty()) continue;
    if (at == text.size()) return out;
    const std::size_t bytes = utf8_at(text, at).bytes;
    out.append(text, at, bytes);
    at += bytes;
  }
  if (!call.budget.spend(1, static_cast<std::int64_t>(text.size() - at))) {
    return call.out_of_budget();
  }
  return out.append(text, at);
}

}  // namespace infllm::engine::jinja
