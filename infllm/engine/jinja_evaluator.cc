// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/jinja_evaluator.h"

#include <algorithm>

#include "infllm/engine/jinja_arithmetic.h"
#include "infllm/engine/jinja_functions.h"
#include "infllm/engine/jinja_lexer.h"

namespace infllm::engine::jinja {

void Scope::set(const std::string& name, Value value) {
  for (auto& [present, old] : variables) {
    if (present == name) {
      old = std::move(value);
      return;
    }
  }
  variables.emplace_back(name, std::move(value));
}

Evaluator::Evaluator(const RenderContext& context)
    : context_(context), budget_{context.limits.steps, context.limits.work_bytes} {}

Result<Value> Evaluator::look_up(const std::string& name) const {
  for (const Scope* scope = scope_; scope != nullptr; scope = scope->parent) {
    for (const auto& [present, value] : scope->variables) {
      if (present == name) return value;
    }
  }
  const auto global = context_.variables.find(name);
  if (global != context_.variables.end()) return global->second;
  if (is_function(name, context_.now.has_value())) {
    return Value(std::make_shared<const Function>(Function{.name = name}));
  }
  return Value(Undefined{std::make_shared<const std::string>("'" + name + "' is undefined")});
}

Result<Value> Evaluator::evaluate(const Expression& e) {
  if (!budget_.spend(1)) return make_call(e.line).out_of_budget();
  using Kind = Expression::Kind;
  switch (e.kind) {
    case Kind::kConstant:
      return e.constant;
    case Kind::kName:
      return look_up(e.name);
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kDict:
      return container(e);
    case Kind::kChain:
      return apply_steps(e, INFLLM_TRY(evaluate(*e.operands[0])), 0);
    case Kind::kArithmetic:
      return arithmetic(e);
    case Kind::kCompare:
      return comparison(e);
    case Kind::kConcatenate: {
      std::string out;
      for (const ExpressionPtr& operand : e.operands) {
        out += INFLLM_TRY(make_call(e.line).text(INFLLM_TRY(evaluate(*operand))));
      }
      return Value(std::move(out));
    }
    case Kind::kAnd:
    case Kind::kOr: {
      Value value;
      for (const ExpressionPtr& operand : e.operands) {
        value = INFLLM_TRY(evaluate(*operand));
        if (truthy(value) == (e.kind == Kind::kOr)) break;
      }
      return value;
    }
    case Kind::kNot:
      return Value(!truthy(INFLLM_TRY(evaluate(*e.operands[0]))));
    case Kind::kNegate:
    case Kind::kPlus:
      return sign(e);
    case Kind::kConditional:
      if (truthy(INFLLM_TRY(evaluate(*e.operands[1])))) return evaluate(*e.operands[0]);
      return e.operands.size() > 2 ? evaluate(*e.operands[2]) : Result<Value>(Value());
  }
  return Value();
}

Result<Value> Evaluator::container(const Expression& e) {
  const Call call = make_call(e.line);
  if (e.kind != Expression::Kind::kDict) {
    std::vector<Value> items;
    for (const ExpressionPtr& operand : e.operands) items.push_back(INFLLM_TRY(evaluate(*operand)));
    const bool tuple = e.kind == Expression::Kind::kTuple;
    return call.list(std::move(items), tuple ? List::Shape::kTuple : List::Shape::kList);
  }
  Dict dict;
  for (std::size_t i = 0; i < e.operands.size(); i += 2) {
    const Value key = INFLLM_TRY(evaluate(*e.operands[i]));
    if (!key.is_string()) {
      return call.fail(fmt::format("keys of a dict are strings here, found a {}", key.type_name()));
    }
    dict.set(*key.string(), INFLLM_TRY(evaluate(*e.operands[i + 1])));
  }
  if (std::optional<Value> made = make_dict(std::move(dict))) return std::move(*made);
  return call.fail(
      fmt::format("a dict holds plain data only, at most {} levels deep", kMaxValueDepth));
}

Result<Value> Evaluator::arithmetic(const Expression& e) {
  Value value = INFLLM_TRY(evaluate(*e.operands[0]));
  for (std::size_t i = 0; i < e.operators.size(); ++i) {
    const Value right = INFLLM_TRY(evaluate(*e.operands[i + 1]));
    value = INFLLM_TRY(calculate(make_call(e.line), e.operators[i], value, right));
  }
  return value;
}

Result<Value> Evaluator::sign(const Expression& e) {
  const Value value = INFLLM_TRY(evaluate(*e.operands[0]));
  const bool negative = e.kind == Expression::Kind::kNegate;
  if (value.is_float()) return Value(negative ? -*value.number() : *value.number());
  const Value zero(std::int64_t{0});
  return calculate(make_call(e.line), negative ? "-" : "+", zero, value);
}

Result<Value> Evaluator::comparison(const Expression& e) {
  const Call call = make_call(e.line);
  Value left = INFLLM_TRY(evaluate(*e.operands[0]));
  for (std::size_t i = 0; i < e.operators.size(); ++i) {
    const Value right = INFLLM_TRY(evaluate(*e.operands[i + 1]));
    const std::string& op = e.operators[i];
    bool holds = false;
    if (op == "in" || op == "not in") {
      holds = INFLLM_TRY(call.contains(right, left)) == (op == "in");
    } else if (op == "==" || op == "!=") {
      holds = INFLLM_TRY(call.is_equal(left, right)) == (op == "==");
    } else {
      const bool greater = op[0] == '>';
      holds =
          greater ? INFLLM_TRY(call.is_less(right, left)) : INFLLM_TRY(call.is_less(left, right));
      if (op.size() == 2) holds = holds || INFLLM_TRY(call.is_equal(left, right));
    }
    if (!holds) return Value(false);
    left = right;
  }
  return Value(true);
}

Result<Value> Evaluator::apply_steps(const Expression& chain, Value value, std::size_t from) {
  for (std::size_t i = from; i < chain.steps.size(); ++i) {
    value = INFLLM_TRY(apply_step(chain.steps[i], std::move(value)));
  }
  return value;
}

Status Evaluator::read_arguments(const Arguments& arguments, Call& call) {
  for (const ExpressionPtr& argument : arguments.positional) {
    call.positional.push_back(INFLLM_TRY(evaluate(*argument)));
  }
  for (const auto& [name, argument] : arguments.named) {
    call.named.emplace_back(name, INFLLM_TRY(evaluate(*argument)));
  }
  return {};
}

Result<Value> Evaluator::apply_step(const Step& step, Value value) {
  Call call = make_call(step.line);
  if (!budget_.spend(1)) return call.out_of_budget();
  using Kind = Step::Kind;
  const bool looks_inside =
      step.kind == Kind::kAttribute || step.kind == Kind::kIndex || step.kind == Kind::kCall;
  if (looks_inside && value.is_undefined()) {
    const auto& reason = value.undefined()->name;
    return call.fail(reason == nullptr ? "an undefined value" : *reason);
  }
  switch (step.kind) {
    case Kind::kAttribute:
      return attribute(call, value, step.name);
    case Kind::kIndex:
      return item(call, value, INFLLM_TRY(evaluate(*step.parts[0])));
    case Kind::kSlice: {
      std::optional<std::int64_t> bounds[3];
      for (int i = 0; i < 3; ++i) {
        if (step.parts[i] == nullptr) continue;
        const Value bound = INFLLM_TRY(evaluate(*step.parts[i]));
        if (bound.is_none()) continue;
        bounds[i] = bound.integer();
        if (!bounds[i]) return call.fail("the bounds of a slice are integers");
      }
      return slice(call, value, {bounds[0], bounds[1], bounds[2]});
    }
    case Kind::kCall:
      INFLLM_TRY(read_arguments(step.arguments, call));
      return call_value(value, call);
    case Kind::kFilter:
      call.name = step.name;
      call.self = std::move(value);
      INFLLM_TRY(read_arguments(step.arguments, call));
      return apply_filter(call);
    case Kind::kTest:
    case Kind::kNotTest:
      call.name = step.name;
      call.self = std::move(value);
      INFLLM_TRY(read_arguments(step.arguments, call));
      return Value(INFLLM_TRY(apply_test(call)) == (step.kind == Kind::kTest));
  }
  return Value();
}

Result<Value> Evaluator::call_value(const Value& callee, Call& call) {
  const Function* function = callee.function();
  if (function == nullptr) {
    return call.fail(fmt::format("a {} cannot be called", callee.type_name()));
  }
  call.name = function->name;
  if (function->macro != nullptr) return call_macro(*function, call);
  if (function->self) {
    call.self = *function->self;
    return call_method(call);
  }
  return call_function(call, context_.now);
}

}  // namespace infllm::engine::jinja
