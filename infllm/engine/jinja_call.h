// SPDX-License-Identifier: Apache-2.0
//
// What filters, tests, methods and functions of the template language have in common: a call with
// its arguments, and helpers that read them as Python would.
#pragma once

#include <fmt/format.h>

#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "infllm/core/status.h"
#include "infllm/engine/jinja_value.h"

namespace infllm::engine::jinja {

struct Call {
  std::string name;
  int line;
  Budget& budget;
  Value self;  // what the filter, test or method works on
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;

  Status fail(std::string_view reason) const;
  Status out_of_budget() const;

  // The arguments in the order of `parameters`, undefined where not given. Fails on one too many
  // and on unknown names.
  Result<std::vector<Value>> bind(std::initializer_list<std::string_view> parameters) const;

  // str() of a value, repr() of containers included.
  Result<std::string> text(const Value& value) const;
  // The items that Python's iteration over the value yields; characters of a string, keys of a
  // dict.
  Result<std::vector<Value>> items(const Value& value) const;
  Result<Value> list(std::vector<Value> items, List::Shape shape = List::Shape::kList) const;
  // An integer argument; `fallback` when it is undefined or None.
  Result<std::int64_t> integer(const Value& value, std::int64_t fallback) const;

  Result<bool> is_equal(const Value& a, const Value& b) const;
  Result<bool> is_less(const Value& a, const Value& b) const;
  Result<bool> contains(const Value& container, const Value& item) const;
};

// x.name and x[key]; undefined when there is no such thing. The value must not be undefined itself.
Result<Value> attribute(const Call& call, const Value& value, const std::string& name);
Result<Value> item(const Call& call, const Value& value, const Value& key);
// "a.b.0" of filters that take an attribute: item() step by step.
Result<Value> attribute_path(const Call& call, const Value& value, const Value& path);

Result<Value> apply_filter(const Call& call);
Result<bool> apply_test(const Call& call);
// call.self is the object.
Result<Value> call_method(const Call& call);
bool has_method(const Value& value, std::string_view name);

// Characters [start, stop) by step, as Python slices: each bound may be missing.
struct Slice {
  std::optional<std::int64_t> start, stop, step;
};
Result<Value> slice(const Call& call, const Value& value, const Slice& bounds);

// Case and blanks of strings. The case functions know ASCII only and fail on other letters.
std::string_view strip(std::string_view text, const std::string* characters, bool left, bool right);
Result<std::string> change_case(const Call& call, std::string_view text, bool upper);
Result<std::string> capitalize(const Call& call, std::string_view text);
Result<std::string> replace(const Call& call, std::string_view text, std::string_view from,
                            std::string_view to, std::int64_t most);

}  // namespace infllm::engine::jinja
