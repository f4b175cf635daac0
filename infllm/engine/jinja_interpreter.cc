// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/jinja_interpreter.h"

#include <fmt/format.h>

#include <algorithm>

#include "infllm/engine/jinja_evaluator.h"
#include "infllm/engine/jinja_lexer.h"

namespace infllm::engine::jinja {
namespace {

enum class Flow { kNext, kBreak, kContinue };

class Interpreter : public Evaluator {
 public:
  using Evaluator::Evaluator;

  Result<std::string> run(const Block& block) {
    INFLLM_TRY(run_block(block));
    return std::move(out_);
  }

 private:
  // A block in a scope of its own, which ends with it.
  class Inner {
   public:
    Inner(Interpreter& interpreter, Scope* parent) : interpreter_(interpreter) {
      outer_ = interpreter_.scope_;
      scope_.parent = parent;
      interpreter_.scope_ = &scope_;
    }
    ~Inner() { interpreter_.scope_ = outer_; }
    Inner(const Inner&) = delete;
    Inner& operator=(const Inner&) = delete;
    Scope& scope() { return scope_; }

   private:
    Interpreter& interpreter_;
    Scope* outer_;
    Scope scope_;
  };

  Status print(std::string_view text, int line) {
    if (!budget_.spend(1, static_cast<std::int64_t>(text.size()))) {
      return make_call(line).out_of_budget();
    }
    out_ += text;
    if (static_cast<std::int64_t>(out_.size()) <= context_.limits.output_bytes) return {};
    return template_error(
        line, fmt::format("more than {} bytes of output", context_.limits.output_bytes));
  }

  // What a block prints, as a string.
  Result<std::string> capture(const Block& block) {
    std::string outer = std::exchange(out_, {});
    const Result<Flow> flow = run_block(block);
    std::string text = std::exchange(out_, std::move(outer));
    if (!flow.ok()) return flow.status();
    return text;
  }

  Result<Flow> run_block(const Block& block) {
    for (const Statement& statement : block) {
      const Flow flow = INFLLM_TRY(run_statement(statement));
      if (flow != Flow::kNext) return flow;
    }
    return Flow::kNext;
  }

  Result<Flow> run_statement(const Statement& s) {
    if (!budget_.spend(1)) return make_call(s.line).out_of_budget();
    using Kind = Statement::Kind;
    switch (s.kind) {
      case Kind::kText:
        INFLLM_TRY(print(s.text, s.line));
        return Flow::kNext;
      case Kind::kPrint: {
        const Value value = INFLLM_TRY(evaluate(*s.expression));
        INFLLM_TRY(print(INFLLM_TRY(make_call(s.line).text(value)), s.line));
        return Flow::kNext;
      }
      case Kind::kIf:
        for (std::size_t i = 0; i < s.conditions.size(); ++i) {
          if (truthy(INFLLM_TRY(evaluate(*s.conditions[i])))) return run_block(s.bodies[i]);
        }
        return s.bodies.size() > s.conditions.size() ? run_block(s.bodies.back())
                                                     : Result<Flow>(Flow::kNext);
      case Kind::kFor:
        return run_for(s);
      case Kind::kSet:
        INFLLM_TRY(assign(s, INFLLM_TRY(evaluate(*s.expression))));
        return Flow::kNext;
      case Kind::kSetBlock:
      case Kind::kFilterBlock: {
        const Inner inner(*this, scope_);
        Value value(INFLLM_TRY(capture(s.bodies[0])));
        value = INFLLM_TRY(apply_steps(*s.expression, std::move(value), 0));
        if (s.kind == Kind::kFilterBlock) {
          INFLLM_TRY(print(INFLLM_TRY(make_call(s.line).text(value)), s.line));
          return Flow::kNext;
        }
        return assign_outside(s, std::move(value));
      }
      case Kind::kMacro:
        return define_macro(s);
      case Kind::kCall:
        return run_call(s);
      case Kind::kWith: {
        std::vector<Value> values;
        for (const ExpressionPtr& value : s.conditions) {
          values.push_back(INFLLM_TRY(evaluate(*value)));
        }
        Inner inner(*this, scope_);
        for (std::size_t i = 0; i < values.size(); ++i) inner.scope().set(s.targets[i], values[i]);
        return run_block(s.bodies[0]);
      }
      case Kind::kScope: {
        const Inner inner(*this, scope_);
        return run_block(s.bodies[0]);
      }
      case Kind::kBreak:
        return Flow::kBreak;
      case Kind::kContinue:
        return Flow::kContinue;
    }
    return Flow::kNext;
  }

  // The block of a {% set %} has its own scope; its result belongs to the one around.
  Result<Flow> assign_outside(const Statement& s, Value value) {
    Scope* const inner = scope_;
    scope_ = inner->parent;
    const Status status = assign(s, std::move(value));
    scope_ = inner;
    if (!status.ok()) return status;
    return Flow::kNext;
  }

  Status assign(const Statement& s, Value value) {
    if (s.targets.size() == 1) return assign_one(s.targets[0], std::move(value), s.line);
    return unpack(s.targets, value, s.line, [&](const std::string& target, const Value& part) {
      return assign_one(target, part, s.line);
    });
  }

  Status assign_one(const std::string& target, Value value, int line) {
    const std::size_t dot = target.find('.');
    if (dot == std::string::npos) {
      scope_->set(target, std::move(value));
      return {};
    }
    const std::string name = target.substr(0, dot), attribute_name = target.substr(dot + 1);
    const Value object = INFLLM_TRY(look_up(name));
    if (object.name_space() == nullptr) {
      return template_error(
          line, fmt::format("\"{}\" is no namespace, so {} cannot be set", name, target));
    }
    if (!value.is_data()) return template_error(line, "a namespace holds plain data only");
    if (attribute_name.starts_with('_')) {
      return template_error(line, "a name in a namespace may not begin with \"_\"");
    }
    object.name_space()->values[attribute_name] = std::move(value);
    return {};
  }

  template <typename Assign>
  Status unpack(const std::vector<std::string>& targets, const Value& value, int line,
                Assign&& assign_part) {
    const std::vector<Value> parts = INFLLM_TRY(make_call(line).items(value));
    if (parts.size() != targets.size()) {
      return template_error(line,
                            fmt::format("{} values for {} names", parts.size(), targets.size()));
    }
    for (std::size_t i = 0; i < parts.size(); ++i) INFLLM_TRY(assign_part(targets[i], parts[i]));
    return {};
  }

  Status bind_loop_variables(const Statement& s, Scope& scope, const Value& value) {
    if (s.targets.size() == 1) {
      scope.set(s.targets[0], value);
      return {};
    }
    return unpack(s.targets, value, s.line, [&](const std::string& target, const Value& part) {
      scope.set(target, part);
      return Status();
    });
  }

  Result<Flow> run_for(const Statement& s) {
    const Value sequence = INFLLM_TRY(evaluate(*s.expression));
    std::vector<Value> items = INFLLM_TRY(make_call(s.line).items(sequence));
    if (s.filter != nullptr) {
      std::vector<Value> kept;
      for (const Value& value : items) {
        Inner inner(*this, scope_);
        INFLLM_TRY(bind_loop_variables(s, inner.scope(), value));
        if (truthy(INFLLM_TRY(evaluate(*s.filter)))) kept.push_back(value);
      }
      items = std::move(kept);
    }
    auto loop = std::make_shared<Loop>();
    loop->items = std::move(items);
    const auto count = static_cast<std::int64_t>(loop->items.size());
    bool completed = false;
    for (loop->index0 = 0; loop->index0 < count; ++loop->index0) {
      if (!budget_.spend(1)) return make_call(s.line).out_of_budget();
      Inner inner(*this, scope_);
      inner.scope().set("loop", Value(loop));
      INFLLM_TRY(bind_loop_variables(s, inner.scope(), loop->items[loop->index0]));
      const Flow flow = INFLLM_TRY(run_block(s.bodies[0]));
      if (flow == Flow::kBreak) break;
      completed |= flow == Flow::kNext;
    }
    // As in Jinja, else runs unless some round came to the end of the body; continue does not.
    if (!completed && s.bodies.size() > 1) {
      const Inner inner(*this, scope_);
      return run_block(s.bodies[1]);
    }
    return Flow::kNext;
  }

  // A macro looks for names where the template begins, which outlives it wherever it is passed.
  Result<Flow> define_macro(const Statement& s) {
    if (scope_ != &root_) {
      return template_error(s.line, "a macro inside a loop, macro or block is not supported");
    }
    scope_->set(s.macro->name,
                Value(std::make_shared<const Function>(
                    Function{.name = s.macro->name, .macro = s.macro.get(), .scope = &root_})));
    return Flow::kNext;
  }

  Result<Flow> run_call(const Statement& s) {
    const Expression& expression = *s.expression;
    const Step& last = expression.steps.back();
    Value callee = INFLLM_TRY(evaluate(*expression.operands[0]));
    for (std::size_t i = 0; i + 1 < expression.steps.size(); ++i) {
      return template_error(s.line, "{% call %} needs the plain name of a macro");
    }
    const Function* function = callee.function();
    if (function == nullptr || function->macro == nullptr) {
      return template_error(s.line, "{% call %} needs a macro");
    }
    Call call = make_call(s.line, function->name);
    INFLLM_TRY(read_arguments(last.arguments, call));
    caller_ = Value(std::make_shared<const Function>(
        Function{.name = "caller", .macro = s.macro.get(), .scope = scope_}));
    const Value text = INFLLM_TRY(call_macro(*function, call));
    INFLLM_TRY(print(*text.string(), s.line));
    return Flow::kNext;
  }

  Result<Value> call_macro(const Function& function, Call& call) override {
    const std::optional<Value> caller = std::exchange(caller_, std::nullopt);
    const MacroNode& macro = *function.macro;
    if (macro_depth_ == context_.limits.macro_depth) {
      return call.fail(fmt::format("macros call each other deeper than {} levels", macro_depth_));
    }
    const std::size_t given = call.positional.size(), wanted = macro.parameters.size();
    if (given > wanted) {
      return call.fail(fmt::format("{} arguments, expected at most {}", given, wanted));
    }
    for (const auto& [name, value] : call.named) {
      const auto found = std::find(macro.parameters.begin(), macro.parameters.end(), name);
      if (found == macro.parameters.end() ||
          static_cast<std::size_t>(found - macro.parameters.begin()) < given) {
        return call.fail(fmt::format("argument \"{:.32}\" is unknown or given twice", name));
      }
    }
    Inner inner(*this, function.scope);
    for (std::size_t i = 0; i < wanted; ++i) {
      const std::string& name = macro.parameters[i];
      const auto named = std::find_if(call.named.begin(), call.named.end(),
                                      [&](const auto& argument) { return argument.first == name; });
      const std::size_t first_default = wanted - macro.defaults.size();
      Value value;
      if (i < given) {
        value = call.positional[i];
      } else if (named != call.named.end()) {
        value = named->second;
      } else if (i >= first_default) {
        value = INFLLM_TRY(evaluate(*macro.defaults[i - first_default]));
      }
      inner.scope().set(name, std::move(value));
    }
    if (caller) inner.scope().set("caller", *caller);
    ++macro_depth_;
    Result<std::string> text = capture(macro.body);
    --macro_depth_;
    return Value(INFLLM_TRY(std::move(text)));
  }

  std::string out_;
  int macro_depth_ = 0;
};

}  // namespace

Result<std::string> render(const Block& block, const RenderContext& context) {
  return Interpreter(context).run(block);
}

}  // namespace infllm::engine::jinja
