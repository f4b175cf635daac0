// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/jinja_arithmetic.h"

#include <cmath>

namespace infllm::engine::jinja {
namespace {

Result<Value> integers(const Call& call, std::string_view op, std::int64_t a, std::int64_t b) {
  std::int64_t out = 0;
  bool overflow = false;
  if (op == "+") {
    overflow = __builtin_add_overflow(a, b, &out);
  } else if (op == "-") {
    overflow = __builtin_sub_overflow(a, b, &out);
  } else if (op == "*") {
    overflow = __builtin_mul_overflow(a, b, &out);
  } else if (op == "**") {
    if (b < 0) {
      if (a == 0) return call.fail("division by zero");
      return Value(std::pow(static_cast<double>(a), static_cast<double>(b)));
    }
    out = 1;
    std::int64_t base = a;
    for (std::int64_t power = b; power > 0 && !overflow; power >>= 1) {
      if ((power & 1) != 0) overflow = __builtin_mul_overflow(out, base, &out);
      // The square after the last bit is not needed and may overflow.
      if (power > 1) overflow |= __builtin_mul_overflow(base, base, &base);
    }
  } else {
    if (b == 0) return call.fail("division by zero");
    if (op == "/") return Value(static_cast<double>(a) / static_cast<double>(b));
    if (a == INT64_MIN && b == -1) {
      if (op == "%") return Value(std::int64_t{0});
      overflow = true;
    } else {
      // Rounds down, and the remainder takes the sign of the divisor.
      const bool adjust = a % b != 0 && (a % b < 0) != (b < 0);
      out = op == "//" ? a / b - (adjust ? 1 : 0) : a % b + (adjust ? b : 0);
    }
  }
  if (overflow) return call.fail("an integer of more than 64 bits");
  return Value(out);
}

Result<Value> floats(const Call& call, std::string_view op, double a, double b) {
  if (op == "+") return Value(a + b);
  if (op == "-") return Value(a - b);
  if (op == "*") return Value(a * b);
  if (op == "**") {
    if ((a == 0 && b < 0) || (a < 0 && b != std::floor(b))) return call.fail("not a real number");
    return Value(std::pow(a, b));
  }
  if (b == 0) return call.fail("division by zero");
  if (op == "/") return Value(a / b);
  double rest = std::fmod(a, b);
  double quotient = (a - rest) / b;
  if (rest != 0 && (rest < 0) != (b < 0)) {
    rest += b;
    quotient -= 1;
  }
  if (op == "%") return Value(rest == 0 ? std::copysign(0.0, b) : rest);
  const double whole = std::floor(quotient);
  if (quotient == 0) return Value(std::copysign(0.0, a / b));
  return Value(quotient - whole > 0.5 ? whole + 1 : whole);
}

Result<Value> repeat(const Call& call, const Value& value, std::int64_t count) {
  count = std::max<std::int64_t>(count, 0);
  if (const std::string* text = value.string()) {
    std::int64_t bytes = 0;
    if (__builtin_mul_overflow(static_cast<std::int64_t>(text->size()), count, &bytes) ||
        !call.budget.spend(1, bytes)) {
      return call.out_of_budget();
    }
    std::string out;
    out.reserve(static_cast<std::size_t>(bytes));
    for (std::int64_t i = 0; i < count && !text->empty(); ++i) out += *text;
    return Value(std::move(out));
  }
  const List& list = *value.list();
  std::int64_t items = 0;
  if (__builtin_mul_overflow(static_cast<std::int64_t>(list.items.size()), count, &items) ||
      items > call.budget.steps) {
    return call.out_of_budget();
  }
  std::vector<Value> out;
  for (std::int64_t i = 0; i < count && !list.items.empty(); ++i) {
    out.insert(out.end(), list.items.begin(), list.items.end());
  }
  return call.list(std::move(out), list.shape);
}

bool is_sequence(const Value& value) {
  const List* list = value.list();
  return value.is_string() || (list != nullptr && (list->shape == List::Shape::kList ||
                                                   list->shape == List::Shape::kTuple));
}

}  // namespace

Result<Value> calculate(const Call& call, std::string_view op, const Value& a, const Value& b) {
  for (const Value* value : {&a, &b}) {
    if (!value->is_undefined()) continue;
    const auto& reason = value->undefined()->name;
    return call.fail(reason == nullptr ? "an undefined value" : *reason);
  }
  if (a.integer() && b.integer()) return integers(call, op, *a.integer(), *b.integer());
  if (a.is_number() && b.is_number()) return floats(call, op, *a.number(), *b.number());
  if (op == "*" && is_sequence(a) && b.integer()) return repeat(call, a, *b.integer());
  if (op == "*" && is_sequence(b) && a.integer()) return repeat(call, b, *a.integer());
  if (op == "+" && a.is_string() && b.is_string()) {
    const std::string& left = *a.string();
    const std::string& right = *b.string();
    if (!call.budget.spend(1, static_cast<std::int64_t>(left.size() + right.size()))) {
      return call.out_of_budget();
    }
    return Value(left + right);
  }
  if (op == "+" && is_sequence(a) && is_sequence(b) && a.list() != nullptr && b.list() != nullptr &&
      a.list()->shape == b.list()->shape) {
    if (!call.budget.spend(static_cast<std::int64_t>(a.list()->items.size()))) {
      return call.out_of_budget();
    }
    std::vector<Value> items = a.list()->items;
    items.insert(items.end(), b.list()->items.begin(), b.list()->items.end());
    return call.list(std::move(items), a.list()->shape);
  }
  return call.fail(
      fmt::format("{} between a {} and a {} is not supported", op, a.type_name(), b.type_name()));
}

}  // namespace infllm::engine::jinja
