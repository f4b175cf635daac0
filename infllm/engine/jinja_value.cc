// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/jinja_value.h"

#include <algorithm>
#include <cmath>

#include "infllm/engine/unicode_tables.h"

namespace infllm::engine::jinja {
namespace {

constexpr std::size_t kIndexedFrom = 8;  // smaller dictionaries are searched from end to end

// Python compares an int with a float exactly, not after rounding the int.
int compare_exact(std::int64_t i, double d) {
  constexpr double kTwo63 = 9223372036854775808.0;
  if (d >= kTwo63) return -1;
  if (d < -kTwo63) return 1;
  const double whole = std::floor(d);
  const auto floor = static_cast<std::int64_t>(whole);
  if (i != floor) return i < floor ? -1 : 1;
  return d > whole ? -1 : 0;
}

// -1, 0, 1; nothing when one is not a number or not comparable (NaN).
std::optional<int> compare_numbers(const Value& a, const Value& b) {
  if (const auto i = a.integer()) {
    if (const auto j = b.integer()) return *i < *j ? -1 : *i > *j;
    const double d = *b.number();
    return std::isnan(d) ? std::nullopt : std::optional<int>(compare_exact(*i, d));
  }
  const double d = *a.number();
  if (std::isnan(d)) return std::nullopt;
  if (const auto j = b.integer()) return -compare_exact(*j, d);
  const double e = *b.number();
  if (std::isnan(e)) return std::nullopt;
  return d < e ? -1 : d > e;
}

}  // namespace

std::optional<std::int64_t> Value::integer() const {
  if (const auto* i = std::get_if<std::int64_t>(&data_)) return *i;
  if (const auto* b = std::get_if<bool>(&data_)) return *b ? 1 : 0;
  return std::nullopt;
}

std::optional<double> Value::number() const {
  if (const auto* d = std::get_if<double>(&data_)) return *d;
  if (const auto i = integer()) return static_cast<double>(*i);
  return std::nullopt;
}

const char* Value::type_name() const {
  constexpr const char* kNames[] = {"undefined", "NoneType", "bool",      "int",  "float",   "str",
                                    "list",      "dict",     "namespace", "loop", "function"};
  if (list() != nullptr) {
    constexpr const char* kShapes[] = {"list", "tuple", "view", "generator"};
    return kShapes[static_cast<int>(list()->shape)];
  }
  return kNames[data_.index()];
}

int Value::depth() const {
  if (const List* l = list()) return l->depth;
  if (const Dict* d = dict()) return d->depth;
  return 0;
}

const Value* Dict::find(std::string_view key) const {
  if (items.size() >= kIndexedFrom) {
    const auto found = index_.find(std::string(key));
    return found == index_.end() ? nullptr : &items[found->second].second;
  }
  for (const auto& [name, value] : items) {
    if (name == key) return &value;
  }
  return nullptr;
}

void Dict::set(std::string_view key, Value value) {
  depth = std::max(depth, value.depth() + 1);
  if (const Value* present = find(key)) {
    const_cast<Value&>(*present) = std::move(value);  // ours: find() is const, the dict is not
    return;
  }
  items.emplace_back(key, std::move(value));
  if (items.size() == kIndexedFrom) {
    for (std::size_t i = 0; i < items.size(); ++i) index_.emplace(items[i].first, i);
  } else if (items.size() > kIndexedFrom) {
    index_.emplace(items.back().first, items.size() - 1);
  }
}

std::optional<Value> make_list(std::vector<Value> items, List::Shape shape) {
  List list{std::move(items), shape, 1};
  for (const Value& item : list.items) {
    if (!item.is_data()) return std::nullopt;
    list.depth = std::max(list.depth, item.depth() + 1);
  }
  if (list.depth > kMaxValueDepth) return std::nullopt;
  return Value(std::make_shared<const List>(std::move(list)));
}

std::optional<Value> make_dict(Dict dict) {
  for (const auto& [key, value] : dict.items) {
    if (!value.is_data()) return std::nullopt;
  }
  if (dict.depth > kMaxValueDepth) return std::nullopt;
  return Value(std::make_shared<const Dict>(std::move(dict)));
}

bool truthy(const Value& value) {
  if (value.is_undefined() || value.is_none()) return false;
  if (const auto number = value.number()) return *number != 0;
  if (const std::string* text = value.string()) return !text->empty();
  if (const List* list = value.list()) {
    return list->shape == List::Shape::kGenerator || !list->items.empty();
  }
  if (const Dict* dict = value.dict()) return !dict->items.empty();
  if (const Loop* loop = value.loop()) return !loop->items.empty();
  return true;
}

std::optional<bool> equal(const Value& a, const Value& b, Budget& budget) {
  if (!budget.spend(1)) return std::nullopt;
  if (a.is_number() && b.is_number()) return compare_numbers(a, b) == 0;
  if (const std::string* s = a.string(), *t = b.string(); s != nullptr && t != nullptr) {
    if (!budget.spend(static_cast<std::int64_t>(s->size() / 256))) return std::nullopt;
    return *s == *t;
  }
  if (const List* l = a.list(), *m = b.list(); l != nullptr && m != nullptr) {
    if (l == m) return true;
    if (l->shape != m->shape || l->items.size() != m->items.size()) return false;
    for (std::size_t i = 0; i < l->items.size(); ++i) {
      const std::optional<bool> same = equal(l->items[i], m->items[i], budget);
      if (same != true) return same;
    }
    return true;
  }
  if (const Dict* d = a.dict(), *e = b.dict(); d != nullptr && e != nullptr) {
    if (d == e) return true;
    if (d->items.size() != e->items.size()) return false;
    for (const auto& [key, value] : d->items) {
      const Value* other = e->find(key);
      if (other == nullptr) return false;
      const std::optional<bool> same = equal(value, *other, budget);
      if (same != true) return same;
    }
    return true;
  }
  if (a.is_undefined() || a.is_none()) {
    return (a.is_undefined() && b.is_undefined()) || (a.is_none() && b.is_none());
  }
  // Namespaces, loops and functions are equal to themselves only.
  if (a.name_space() != nullptr) return a.name_space() == b.name_space();
  if (a.loop() != nullptr) return a.loop() == b.loop();
  if (a.function() != nullptr) return a.function() == b.function();
  return false;
}

std::optional<bool> less(const Value& a, const Value& b, Budget& budget) {
  if (!budget.spend(1)) return std::nullopt;
  if (a.is_number() && b.is_number()) return compare_numbers(a, b) == -1;
  if (const std::string* s = a.string(), *t = b.string(); s != nullptr && t != nullptr) {
    if (!budget.spend(static_cast<std::int64_t>(s->size() / 256))) return std::nullopt;
    return *s < *t;  // UTF-8 sorts as its code points do
  }
  if (const List* l = a.list(), *m = b.list(); l != nullptr && m != nullptr) {
    if (l->shape != m->shape) return std::nullopt;
    for (std::size_t i = 0; i < l->items.size() && i < m->items.size(); ++i) {
      const std::optional<bool> same = equal(l->items[i], m->items[i], budget);
      if (!same) return std::nullopt;
      if (!*same) return less(l->items[i], m->items[i], budget);
    }
    return l->items.size() < m->items.size();
  }
  return std::nullopt;
}

}  // namespace infllm::engine::jinja
