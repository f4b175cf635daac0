// SPDX-License-Identifier: Apache-2.0
//
// A parsed template. Chains that a parser would usually nest to the left (a + b + c, x.y[0]|trim)
// are flat lists here, so that the depth of the tree is the depth of brackets and blocks, which the
// parser bounds.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "infllm/engine/jinja_value.h"

namespace infllm::engine::jinja {

struct Expression;
using ExpressionPtr = std::unique_ptr<Expression>;

struct Arguments {
  std::vector<ExpressionPtr> positional;
  std::vector<std::pair<std::string, ExpressionPtr>> named;
};

// One step of a chain behind a value: .name [index] [a:b:c] (...) |filter(...) is test(...)
struct Step {
  enum class Kind { kAttribute, kIndex, kSlice, kCall, kFilter, kTest, kNotTest };
  Kind kind;
  int line;
  std::string name;
  ExpressionPtr parts[3];  // the index, or the bounds of a slice as far as given
  Arguments arguments;
};

struct Expression {
  enum class Kind {
    kConstant,
    kName,
    kList,
    kTuple,
    kDict,         // operands: key, value, key, value, ...
    kChain,        // operands[0], then steps
    kArithmetic,   // operands[0] operators[0] operands[1] ... from the left
    kConcatenate,  // ~
    kCompare,      // operators too; "in" and "not in" among them
    kAnd,
    kOr,
    kNot,
    kNegate,
    kPlus,
    kConditional,  // operands: then, condition, and else where there is one
  };
  Kind kind;
  int line;
  std::string name;
  Value constant;
  std::vector<ExpressionPtr> operands;
  std::vector<std::string> operators;
  std::vector<Step> steps;
};

struct Statement;
using Block = std::vector<Statement>;

struct MacroNode {
  std::string name;
  std::vector<std::string> parameters;
  std::vector<ExpressionPtr> defaults;  // of the last parameters
  std::vector<Statement> body;
};

struct Statement {
  enum class Kind {
    kText,
    kPrint,
    kIf,        // conditions and bodies in pairs; a body more is the else
    kFor,       // bodies: the loop, and the else where there is one
    kSet,       // targets = expression
    kSetBlock,  // targets[0], filters in steps of the expression, bodies[0]
    kMacro,
    kCall,         // expression with caller = macro
    kFilterBlock,  // steps of the expression, applied to bodies[0]
    kWith,         // targets[i] = conditions[i], then bodies[0]
    kScope,        // bodies[0] on its own ({% generation %})
    kBreak,
    kContinue,
  };
  Kind kind;
  int line;
  std::string text;
  std::vector<std::string> targets;  // "name", or "namespace.attribute"
  ExpressionPtr expression;
  ExpressionPtr filter;  // of a for statement
  std::vector<ExpressionPtr> conditions;
  std::vector<Block> bodies;
  std::unique_ptr<MacroNode> macro;
};

}  // namespace infllm::engine::jinja
