// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "infllm/engine/jinja_call.h"
#include "infllm/engine/jinja_filters.h"
#include "infllm/engine/utf8.h"

namespace infllm::engine::jinja {
namespace {

using Shape = List::Shape;

// What sort, unique, min and max compare: the value or an attribute of it, without case if asked.
Result<Value> sort_key(const Call& call, const Value& value, const Value& path, bool with_case) {
  Value key = value;
  // "a,b" sorts by a, then by b.
  const std::size_t comma = path.is_string() ? path.string()->find(',') : std::string::npos;
  if (comma != std::string::npos) {
    const std::string& text = *path.string();
    std::vector<Value> keys;
    for (std::size_t begin = 0; begin <= text.size();) {
      const std::size_t end = std::min(text.find(',', begin), text.size());
      keys.push_back(
          INFLLM_TRY(sort_key(call, value, Value(text.substr(begin, end - begin)), with_case)));
      begin = end + 1;
    }
    return call.list(std::move(keys));
  }
  if (!path.is_undefined() && !path.is_none()) key = INFLLM_TRY(attribute_path(call, value, path));
  if (with_case || !key.is_string()) return key;
  return Value(INFLLM_TRY(change_case(call, *key.string(), false)));
}

struct Keyed {
  Value key, value;
};

Result<std::vector<Keyed>> keyed(const Call& call, std::vector<Value> items, const Value& path,
                                 bool with_case) {
  std::vector<Keyed> out;
  for (Value& value : items) {
    out.push_back({INFLLM_TRY(sort_key(call, value, path, with_case)), std::move(value)});
  }
  return out;
}

// A stable sort that can stop at two items without an order: merges of runs from the bottom up.
Status stable_sort(const Call& call, std::vector<Keyed>& items, bool reverse) {
  std::vector<Keyed> merged(items.size());
  for (std::size_t run = 1; run < items.size(); run *= 2) {
    for (std::size_t begin = 0; begin < items.size(); begin += 2 * run) {
      std::size_t a = begin, b = std::min(begin + run, items.size());
      const std::size_t a_end = b, b_end = std::min(begin + 2 * run, items.size());
      for (std::size_t out = begin; out < b_end; ++out) {
        bool take_b = a == a_end;
        if (a < a_end && b < b_end) {
          take_b = reverse ? INFLLM_TRY(call.is_less(items[a].key, items[b].key))
                           : INFLLM_TRY(call.is_less(items[b].key, items[a].key));
        }
        merged[out] = std::move(take_b ? items[b++] : items[a++]);
      }
    }
    items.swap(merged);
  }
  return {};
}

Result<Value> sort(const Call& call) {
  const std::vector<Value> bound =
      INFLLM_TRY(call.bind({"reverse", "case_sensitive", "attribute"}));
  std::vector<Keyed> items =
      INFLLM_TRY(keyed(call, INFLLM_TRY(call.items(call.self)), bound[2], truthy(bound[1])));
  INFLLM_TRY(stable_sort(call, items, truthy(bound[0])));
  std::vector<Value> out;
  for (Keyed& item : items) out.push_back(std::move(item.value));
  return call.list(std::move(out));
}

Result<Value> dict_sort(const Call& call) {
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"case_sensitive", "by", "reverse"}));
  const Dict* dict = call.self.dict();
  if (dict == nullptr) return call.fail("needs a dict");
  const std::string by = bound[1].is_undefined() ? "key" : INFLLM_TRY(call.text(bound[1]));
  if (by != "key" && by != "value") return call.fail("by must be \"key\" or \"value\"");
  std::vector<Keyed> items;
  for (const auto& [name, value] : dict->items) {
    const Value key = by == "key" ? Value(name) : value;
    items.push_back({INFLLM_TRY(sort_key(call, key, Value(), truthy(bound[0]))),
                     INFLLM_TRY(call.list({Value(name), value}, Shape::kTuple))});
  }
  INFLLM_TRY(stable_sort(call, items, truthy(bound[2])));
  std::vector<Value> out;
  for (Keyed& item : items) out.push_back(std::move(item.value));
  return call.list(std::move(out));
}

Result<Value> extreme(const Call& call) {
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"case_sensitive", "attribute"}));
  const std::vector<Keyed> items =
      INFLLM_TRY(keyed(call, INFLLM_TRY(call.items(call.self)), bound[1], truthy(bound[0])));
  if (items.empty()) return Value();
  const Keyed* best = &items[0];
  for (const Keyed& item : items) {
    const bool better = call.name == "min" ? INFLLM_TRY(call.is_less(item.key, best->key))
                                           : INFLLM_TRY(call.is_less(best->key, item.key));
    if (better) best = &item;
  }
  return best->value;
}

Result<Value> unique(const Call& call) {
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"case_sensitive", "attribute"}));
  std::vector<Value> seen, out;
  for (Keyed& item :
       INFLLM_TRY(keyed(call, INFLLM_TRY(call.items(call.self)), bound[1], truthy(bound[0])))) {
    bool is_new = true;
    for (const Value& key : seen) {
      if (INFLLM_TRY(call.is_equal(key, item.key))) is_new = false;
    }
    if (!is_new) continue;
    seen.push_back(item.key);
    out.push_back(std::move(item.value));
  }
  return call.list(std::move(out), Shape::kGenerator);
}

Result<Value> join(const Call& call) {
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"d", "attribute"}));
  const std::string separator = INFLLM_TRY(call.text(bound[0]));
  std::string out;
  bool first = true;
  for (const Value& value : INFLLM_TRY(call.items(call.self))) {
    if (!first) out += separator;
    first = false;
    const bool path = !bound[1].is_undefined() && !bound[1].is_none();
    const Value part = path ? INFLLM_TRY(attribute_path(call, value, bound[1])) : value;
    out += INFLLM_TRY(call.text(part));
    if (!call.budget.spend(1, static_cast<std::int64_t>(separator.size()))) {
      return call.out_of_budget();
    }
  }
  return Value(std::move(out));
}

Result<Value> map(const Call& call) {
  std::vector<Value> out;
  const std::vector<Value> items = INFLLM_TRY(call.items(call.self));
  if (call.positional.empty()) {
    const std::vector<Value> bound = INFLLM_TRY(call.bind({"attribute", "default"}));
    if (bound[0].is_undefined()) return call.fail("needs the name of a filter or an attribute");
    for (const Value& value : items) {
      Value found = INFLLM_TRY(attribute_path(call, value, bound[0]));
      out.push_back(found.is_undefined() && !bound[1].is_undefined() ? bound[1] : found);
    }
    return call.list(std::move(out), Shape::kGenerator);
  }
  Call inner{INFLLM_TRY(call.text(call.positional[0])), call.line, call.budget, {}, {}, call.named};
  if (inner.name == "map") return call.fail("a map of maps is not supported");
  inner.positional.assign(call.positional.begin() + 1, call.positional.end());
  for (const Value& value : items) {
    inner.self = value;
    out.push_back(INFLLM_TRY(apply_filter(inner)));
    if (!call.budget.spend(1)) return call.out_of_budget();
  }
  return call.list(std::move(out), Shape::kGenerator);
}

// select, reject, selectattr, rejectattr: by a test with arguments, or by truth.
Result<Value> select(const Call& call) {
  const bool by_attribute = call.name.ends_with("attr");
  const bool keep = call.name.starts_with("select");
  const std::size_t used = by_attribute ? 1 : 0;
  if (call.positional.size() < used) return call.fail("needs the name of an attribute");
  Call test{"", call.line, call.budget, {}, {}, call.named};
  if (call.positional.size() > used) {
    test.name = INFLLM_TRY(call.text(call.positional[used]));
    test.positional.assign(call.positional.begin() + static_cast<std::ptrdiff_t>(used) + 1,
                           call.positional.end());
  }
  std::vector<Value> out;
  for (const Value& value : INFLLM_TRY(call.items(call.self))) {
    test.self = by_attribute ? INFLLM_TRY(attribute_path(call, value, call.positional[0])) : value;
    const bool passes = test.name.empty() ? truthy(test.self) : INFLLM_TRY(apply_test(test));
    if (passes == keep) out.push_back(value);
    if (!call.budget.spend(1)) return call.out_of_budget();
  }
  return call.list(std::move(out), Shape::kGenerator);
}

Result<Value> sum(const Call& call) {
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"attribute", "start"}));
  const Value start = bound[1].is_undefined() ? Value(std::int64_t{0}) : bound[1];
  if (!start.is_number()) return call.fail("adds numbers only");
  std::int64_t whole = start.integer().value_or(0);
  double real = *start.number();
  bool is_whole = start.integer().has_value();
  for (const Value& value : INFLLM_TRY(call.items(call.self))) {
    const bool path = !bound[0].is_undefined() && !bound[0].is_none();
    const Value term = path ? INFLLM_TRY(attribute_path(call, value, bound[0])) : value;
    if (!term.is_number()) {
      return call.fail(fmt::format("adds numbers only, found a {}", term.type_name()));
    }
    is_whole = is_whole && term.integer().has_value();
    if (is_whole && __builtin_add_overflow(whole, *term.integer(), &whole)) {
      return call.fail("an integer of more than 64 bits");
    }
    real += *term.number();
  }
  return is_whole ? Value(whole) : Value(real);
}

Result<Value> ends(const Call& call) {
  INFLLM_TRY(call.bind({}));
  const bool last = call.name == "last";
  if (last && call.self.list() != nullptr && call.self.list()->shape == Shape::kGenerator) {
    return call.fail("a generator has no last item; make it a list");
  }
  const std::vector<Value> items = INFLLM_TRY(call.items(call.self));
  if (items.empty()) return Value();
  return last ? items.back() : items.front();
}

Result<Value> reverse(const Call& call) {
  INFLLM_TRY(call.bind({}));
  std::vector<Value> items = INFLLM_TRY(call.items(call.self));
  std::reverse(items.begin(), items.end());
  if (!call.self.is_string()) return call.list(std::move(items), Shape::kGenerator);
  std::string out;
  for (const Value& character : items) out += *character.string();
  return Value(std::move(out));
}

Result<Value> items(const Call& call) {
  INFLLM_TRY(call.bind({}));
  const Dict* dict = call.self.dict();
  if (dict == nullptr && !call.self.is_undefined()) return call.fail("needs a dict");
  std::vector<Value> out;
  if (dict != nullptr) {
    for (const auto& [key, value] : dict->items) {
      out.push_back(INFLLM_TRY(call.list({Value(key), value}, Shape::kTuple)));
    }
  }
  return call.list(std::move(out), Shape::kGenerator);
}

}  // namespace

Result<Value> apply_sequence_filter(const Call& call) {
  const std::string& name = call.name;
  if (name == "join") return join(call);
  if (name == "map") return map(call);
  if (name == "select" || name == "reject" || name == "selectattr" || name == "rejectattr") {
    return select(call);
  }
  if (name == "first" || name == "last") return ends(call);
  if (name == "items") return items(call);
  if (name == "list") {
    INFLLM_TRY(call.bind({}));
    return call.list(INFLLM_TRY(call.items(call.self)));
  }
  if (name == "sort") return sort(call);
  if (name == "dictsort") return dict_sort(call);
  if (name == "min" || name == "max") return extreme(call);
  if (name == "unique") return unique(call);
  if (name == "sum") return sum(call);
  if (name == "reverse") return reverse(call);
  return call.fail("no such filter");
}

}  // namespace infllm::engine::jinja
