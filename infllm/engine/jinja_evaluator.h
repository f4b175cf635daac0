// SPDX-License-Identifier: Apache-2.0
//
// The expression half of the interpreter, which the statement half (jinja_interpreter.cc) builds
// on.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "infllm/core/status.h"
#include "infllm/engine/jinja_ast.h"
#include "infllm/engine/jinja_call.h"
#include "infllm/engine/jinja_interpreter.h"

namespace infllm::engine::jinja {

// Variables of one block; names that are not here are looked for in the parent.
struct Scope {
  Scope* parent = nullptr;
  std::vector<std::pair<std::string, Value>> variables;

  void set(const std::string& name, Value value);
};

class Evaluator {
 public:
  explicit Evaluator(const RenderContext& context);
  virtual ~Evaluator() = default;

 protected:
  Result<Value> evaluate(const Expression& expression);
  // The steps of a chain from `from` on, applied to `value`.
  Result<Value> apply_steps(const Expression& chain, Value value, std::size_t from);
  virtual Result<Value> call_macro(const Function& macro, Call& call) = 0;

  Result<Value> look_up(const std::string& name) const;
  Call make_call(int line, std::string name = "") {
    return {std::move(name), line, budget_, {}, {}, {}};
  }
  Status read_arguments(const Arguments& arguments, Call& call);

  const RenderContext& context_;
  Budget budget_;
  Scope root_;
  Scope* scope_ = &root_;
  // What a {% call %} puts into the next macro call.
  std::optional<Value> caller_;

 private:
  Result<Value> arithmetic(const Expression& expression);
  Result<Value> comparison(const Expression& expression);
  Result<Value> container(const Expression& expression);
  Result<Value> sign(const Expression& expression);
  Result<Value> apply_step(const Step& step, Value value);
  Result<Value> call_value(const Value& callee, Call& call);
};

}  // namespace infllm::engine::jinja
