// SPDX-License-Identifier: Apache-2.0
//
// Tests: what may follow "is".
#include "infllm/engine/jinja_call.h"

namespace infllm::engine::jinja {

Result<bool> apply_test(const Call& call) {
  const std::string& name = call.name;
  const Value& value = call.self;
  // Those with one argument.
  if (name == "eq" || name == "equalto" || name == "==" || name == "ne" || name == "!=" ||
      name == "lt" || name == "lessthan" || name == "<" || name == "gt" || name == "greaterthan" ||
      name == ">" || name == "le" || name == "<=" || name == "ge" || name == ">=" || name == "in" ||
      name == "divisibleby" || name == "sameas") {
    const std::vector<Value> bound = INFLLM_TRY(call.bind({"other"}));
    if (call.positional.size() + call.named.size() != 1) return call.fail("needs one argument");
    const Value& other = bound[0];
    if (name == "eq" || name == "equalto" || name == "==") return call.is_equal(value, other);
    if (name == "ne" || name == "!=") return !INFLLM_TRY(call.is_equal(value, other));
    if (name == "lt" || name == "lessthan" || name == "<") return call.is_less(value, other);
    if (name == "gt" || name == "greaterthan" || name == ">") return call.is_less(other, value);
    if (name == "le" || name == "<=") {
      return INFLLM_TRY(call.is_less(value, other)) || INFLLM_TRY(call.is_equal(value, other));
    }
    if (name == "ge" || name == ">=") {
      return INFLLM_TRY(call.is_less(other, value)) || INFLLM_TRY(call.is_equal(value, other));
    }
    if (name == "in") return call.contains(other, value);
    if (name == "sameas") {
      // Identity, which only None, True, False and undefined have for sure.
      const bool kinds = value.is_bool() == other.is_bool() && value.is_none() == other.is_none();
      return kinds && INFLLM_TRY(call.is_equal(value, other));
    }
    const auto a = value.integer(), b = other.integer();
    if (!a || !b || *b == 0) return call.fail("needs integers, and a divisor other than 0");
    return *b == -1 || *a % *b == 0;  // the smallest integer has no quotient by -1
  }
  INFLLM_TRY(call.bind({}));
  if (name == "defined") return !value.is_undefined();
  if (name == "undefined") return value.is_undefined();
  if (name == "none") return value.is_none();
  if (name == "boolean") return value.is_bool();
  if (name == "true") return value.is_bool() && truthy(value);
  if (name == "false") return value.is_bool() && !truthy(value);
  if (name == "integer") return value.is_int();
  if (name == "float") return value.is_float();
  if (name == "number") return value.is_number();
  if (name == "string") return value.is_string();
  if (name == "mapping") return value.dict() != nullptr;
  if (name == "callable") return value.function() != nullptr;
  if (name == "iterable") {
    return value.is_undefined() || value.is_string() || value.list() != nullptr ||
           value.dict() != nullptr || value.loop() != nullptr;
  }
  if (name == "sequence") {
    const List* list = value.list();
    return value.is_undefined() || value.is_string() || value.dict() != nullptr ||
           (list != nullptr &&
            (list->shape == List::Shape::kList || list->shape == List::Shape::kTuple));
  }
  if (name == "odd" || name == "even") {
    const auto i = value.integer();
    if (!i) return call.fail("needs an integer");
    return (*i % 2 != 0) == (name == "odd");
  }
  if (name == "lower" || name == "upper") {
    const std::string text = INFLLM_TRY(call.text(value));
    Call method{"is" + name, call.line, call.budget, Value(text), {}, {}};
    return truthy(INFLLM_TRY(call_method(method)));
  }
  return call.fail("no such test");
}

}  // namespace infllm::engine::jinja
