// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/jinja_parser_expression.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>

namespace infllm::engine::jinja {

Status ExpressionParser::unexpected(std::string_view expected) const {
  const Token& token = peek();
  const bool end = token.kind == Token::Kind::kEnd;
  const bool close = token.kind == Token::Kind::kBlockEnd || token.kind == Token::Kind::kPrintEnd;
  return fail(fmt::format("expected {}, found {}", expected,
                          end     ? "the end of the template"
                          : close ? "the end of the tag"
                                  : fmt::format("\"{:.64}\"", token.text)));
}

Status ExpressionParser::expect_operator(std::string_view text) {
  return take_operator(text) ? Status() : unexpected(fmt::format("\"{}\"", text));
}

Result<std::string> ExpressionParser::expect_identifier(std::string_view what) {
  if (peek().kind != Token::Kind::kName) return unexpected(what);
  return take().text;
}

Status ExpressionParser::check_depth() const {
  if (depth_ <= kMaxNesting) return {};
  return fail(fmt::format("nested deeper than {} levels", kMaxNesting));
}

ExpressionPtr ExpressionParser::node(Kind kind) const {
  auto expression = std::make_unique<Expression>();
  expression->kind = kind;
  expression->line = peek().line;
  return expression;
}

Result<ExpressionPtr> ExpressionParser::expression(bool with_condition) {
  const Level level(depth_);
  INFLLM_TRY(check_depth());
  ExpressionPtr value = INFLLM_TRY(disjunction());
  while (with_condition && is_name("if")) {
    ExpressionPtr conditional = node(Kind::kConditional);
    take();
    conditional->operands.push_back(std::move(value));
    conditional->operands.push_back(INFLLM_TRY(disjunction()));
    if (!take_name("else")) {
      value = std::move(conditional);
      // "a if b if c" nests to the left without a bracket.
      if (is_name("if")) return fail("a conditional in a conditional needs brackets");
      break;
    }
    conditional->operands.push_back(INFLLM_TRY(expression()));
    value = std::move(conditional);
  }
  return value;
}

Result<ExpressionPtr> ExpressionParser::tuple_or_expression(bool with_condition) {
  ExpressionPtr first = INFLLM_TRY(expression(with_condition));
  if (!is_operator(",")) return first;
  ExpressionPtr tuple = node(Kind::kTuple);
  tuple->operands.push_back(std::move(first));
  while (take_operator(",")) {
    const Token::Kind next = peek().kind;
    if (next == Token::Kind::kBlockEnd || next == Token::Kind::kPrintEnd || is_operator(")")) break;
    tuple->operands.push_back(INFLLM_TRY(expression(with_condition)));
  }
  return tuple;
}

// operand word operand word ..., one node for all of them
Result<ExpressionPtr> ExpressionParser::joined(Kind kind, std::string_view word, Parse operand) {
  ExpressionPtr first = INFLLM_TRY((this->*operand)());
  if (!is_name(word)) return first;
  ExpressionPtr all = node(kind);
  all->operands.push_back(std::move(first));
  while (take_name(word)) all->operands.push_back(INFLLM_TRY((this->*operand)()));
  return all;
}

Result<ExpressionPtr> ExpressionParser::chained(Kind kind,
                                                std::initializer_list<std::string_view> operators,
                                                Parse operand) {
  const auto is_one = [&] {
    return peek().kind == Token::Kind::kOperator &&
           std::find(operators.begin(), operators.end(), peek().text) != operators.end();
  };
  ExpressionPtr first = INFLLM_TRY((this->*operand)());
  if (!is_one()) return first;
  ExpressionPtr all = node(kind);
  all->operands.push_back(std::move(first));
  while (is_one()) {
    all->operators.push_back(take().text);
    all->operands.push_back(INFLLM_TRY((this->*operand)()));
  }
  return all;
}

Result<ExpressionPtr> ExpressionParser::disjunction() {
  return joined(Kind::kOr, "or", &ExpressionParser::conjunction);
}

Result<ExpressionPtr> ExpressionParser::conjunction() {
  return joined(Kind::kAnd, "and", &ExpressionParser::negation);
}

Result<ExpressionPtr> ExpressionParser::negation() {
  if (!is_name("not")) return comparison();
  const Level level(depth_);
  INFLLM_TRY(check_depth());
  ExpressionPtr value = node(Kind::kNot);
  take();
  value->operands.push_back(INFLLM_TRY(negation()));
  return value;
}

Result<ExpressionPtr> ExpressionParser::comparison() {
  ExpressionPtr first = INFLLM_TRY(sum());
  ExpressionPtr all = node(Kind::kCompare);
  while (true) {
    if (peek().kind == Token::Kind::kOperator &&
        (peek().text == "==" || peek().text == "!=" || peek().text == "<" || peek().text == "<=" ||
         peek().text == ">" || peek().text == ">=")) {
      all->operators.push_back(take().text);
    } else if (take_name("in")) {
      all->operators.emplace_back("in");
    } else if (is_name("not") && peek(1).kind == Token::Kind::kName && peek(1).text == "in") {
      take();
      take();
      all->operators.emplace_back("not in");
    } else {
      break;
    }
    all->operands.push_back(INFLLM_TRY(sum()));
  }
  if (all->operators.empty()) return first;
  all->operands.insert(all->operands.begin(), std::move(first));
  return all;
}

Result<ExpressionPtr> ExpressionParser::sum() {
  return chained(Kind::kArithmetic, {"+", "-"}, &ExpressionParser::concatenation);
}

Result<ExpressionPtr> ExpressionParser::concatenation() {
  return chained(Kind::kConcatenate, {"~"}, &ExpressionParser::product);
}

Result<ExpressionPtr> ExpressionParser::product() {
  return chained(Kind::kArithmetic, {"*", "/", "//", "%"}, &ExpressionParser::power);
}

Result<ExpressionPtr> ExpressionParser::power() {
  return chained(Kind::kArithmetic, {"**"}, &ExpressionParser::unary);
}

Result<ExpressionPtr> ExpressionParser::unary() { return signed_operand(/*with_filters=*/true); }

// A sign binds less than attributes and calls, and more than filters: -x.y|abs is (-(x.y))|abs.
Result<ExpressionPtr> ExpressionParser::signed_operand(bool with_filters) {
  const Level level(depth_);
  INFLLM_TRY(check_depth());
  if (is_operator("-") || is_operator("+")) {
    ExpressionPtr value = node(is_operator("-") ? Kind::kNegate : Kind::kPlus);
    take();
    value->operands.push_back(INFLLM_TRY(signed_operand(/*with_filters=*/false)));
    return with_filters ? chain(std::move(value), true) : Result<ExpressionPtr>(std::move(value));
  }
  return chain(INFLLM_TRY(primary()), with_filters);
}

Result<ExpressionPtr> ExpressionParser::primary() {
  const Token& token = peek();
  ExpressionPtr constant = node(Kind::kConstant);
  switch (token.kind) {
    case Token::Kind::kName: {
      const std::string& name = take().text;
      if (name == "true" || name == "True") {
        constant->constant = Value(true);
      } else if (name == "false" || name == "False") {
        constant->constant = Value(false);
      } else if (name == "none" || name == "None") {
        constant->constant = Value(None());
      } else {
        constant->kind = Kind::kName;
        constant->name = name;
      }
      return constant;
    }
    case Token::Kind::kString: {
      std::string text;
      while (peek().kind == Token::Kind::kString) text += take().text;
      constant->constant = Value(std::move(text));
      return constant;
    }
    case Token::Kind::kInteger: {
      std::int64_t value = 0;
      const char* end = token.text.data() + token.text.size();
      const auto parsed = std::from_chars(token.text.data(), end, value);
      if (parsed.ec != std::errc()) return fail("an integer of more than 64 bits");
      constant->constant = Value(value);
      take();
      return constant;
    }
    case Token::Kind::kFloat: {
      double value = 0;
      const char* end = token.text.data() + token.text.size();
      const auto parsed = std::from_chars(token.text.data(), end, value);
      if (parsed.ec != std::errc()) return fail("a float out of range");
      constant->constant = Value(value);
      take();
      return constant;
    }
    default:
      if (take_operator("(")) return parenthesis();
      if (take_operator("[")) return list();
      if (take_operator("{")) return dict();
      return unexpected("an expression");
  }
}

Result<ExpressionPtr> ExpressionParser::parenthesis() {
  if (is_operator(")")) {
    ExpressionPtr empty = node(Kind::kTuple);
    take();
    return empty;
  }
  ExpressionPtr value = INFLLM_TRY(tuple_or_expression());
  INFLLM_TRY(expect_operator(")"));
  return value;
}

Result<ExpressionPtr> ExpressionParser::list() {
  ExpressionPtr value = node(Kind::kList);
  while (!is_operator("]")) {
    value->operands.push_back(INFLLM_TRY(expression()));
    if (!is_operator("]")) INFLLM_TRY(expect_operator(","));
  }
  take();
  return value;
}

Result<ExpressionPtr> ExpressionParser::dict() {
  ExpressionPtr value = node(Kind::kDict);
  while (!is_operator("}")) {
    value->operands.push_back(INFLLM_TRY(expression()));
    INFLLM_TRY(expect_operator(":"));
    value->operands.push_back(INFLLM_TRY(expression()));
    if (!is_operator("}")) INFLLM_TRY(expect_operator(","));
  }
  take();
  return value;
}

Result<ExpressionPtr> ExpressionParser::chain(ExpressionPtr base, bool with_filters) {
  ExpressionPtr chain = node(Kind::kChain);
  const bool is_signed = base->kind == Kind::kNegate || base->kind == Kind::kPlus;
  chain->operands.push_back(std::move(base));
  if (!is_signed) INFLLM_TRY(postfix(*chain, /*with_calls=*/true));
  while (with_filters) {
    if (is_operator("|")) {
      INFLLM_TRY(filters(*chain, /*first_bare=*/false));
    } else if (is_name("is")) {
      INFLLM_TRY(test(*chain));
    } else if (is_operator("(")) {
      Step step{Step::Kind::kCall, peek().line, "", {}, {}};
      take();
      step.arguments = INFLLM_TRY(arguments());
      chain->steps.push_back(std::move(step));
    } else {
      break;
    }
  }
  if (chain->steps.empty()) return std::move(chain->operands[0]);
  return chain;
}

Status ExpressionParser::postfix(Expression& chain, bool with_calls) {
  while (true) {
    Step step{Step::Kind::kAttribute, peek().line, "", {}, {}};
    if (take_operator(".")) {
      if (peek().kind == Token::Kind::kInteger) {
        step.kind = Step::Kind::kIndex;
        step.parts[0] = INFLLM_TRY(primary());
      } else {
        step.name = INFLLM_TRY(expect_identifier("a name after \".\""));
      }
    } else if (take_operator("[")) {
      INFLLM_TRY(subscript(step));
    } else if (with_calls && take_operator("(")) {
      step.kind = Step::Kind::kCall;
      step.arguments = INFLLM_TRY(arguments());
    } else {
      return {};
    }
    chain.steps.push_back(std::move(step));
  }
}

Status ExpressionParser::subscript(Step& step) {
  step.kind = Step::Kind::kIndex;
  for (int part = 0; part < 3; ++part) {
    if (!is_operator(":") && !is_operator("]")) step.parts[part] = INFLLM_TRY(expression());
    if (is_operator("]")) break;
    if (!is_operator(":") || part == 2) return unexpected("\"]\"");
    take();
    step.kind = Step::Kind::kSlice;
  }
  if (step.kind == Step::Kind::kIndex && step.parts[0] == nullptr) {
    return unexpected("an expression");
  }
  return expect_operator("]");
}

Result<Arguments> ExpressionParser::arguments() {
  Arguments out;
  while (!is_operator(")")) {
    if (is_operator("*") || is_operator("**")) return fail("* and ** arguments are not supported");
    const bool named = peek().kind == Token::Kind::kName &&
                       peek(1).kind == Token::Kind::kOperator && peek(1).text == "=";
    if (named) {
      const std::string name = take().text;
      take();
      out.named.emplace_back(name, INFLLM_TRY(expression()));
    } else if (!out.named.empty()) {
      return fail("a positional argument after a named one");
    } else {
      out.positional.push_back(INFLLM_TRY(expression()));
    }
    if (!is_operator(")")) INFLLM_TRY(expect_operator(","));
  }
  take();
  return out;
}

Status ExpressionParser::filters(Expression& chain, bool first_bare) {
  while (first_bare || take_operator("|")) {
    first_bare = false;
    Step step{Step::Kind::kFilter, peek().line, "", {}, {}};
    step.name = INFLLM_TRY(expect_identifier("the name of a filter"));
    if (take_operator("(")) step.arguments = INFLLM_TRY(arguments());
    chain.steps.push_back(std::move(step));
  }
  return {};
}

// is [not] name, with arguments in brackets or one argument bare: x is divisibleby 3
Status ExpressionParser::test(Expression& chain) {
  Step step{Step::Kind::kTest, peek().line, "", {}, {}};
  take();
  if (take_name("not")) step.kind = Step::Kind::kNotTest;
  step.name = INFLLM_TRY(expect_identifier("the name of a test"));
  const Token& next = peek();
  const bool value = next.kind == Token::Kind::kString || next.kind == Token::Kind::kInteger ||
                     next.kind == Token::Kind::kFloat || is_operator("[") || is_operator("{");
  const bool name = next.kind == Token::Kind::kName && next.text != "else" && next.text != "or" &&
                    next.text != "and" && next.text != "is" && next.text != "if" &&
                    next.text != "in" && next.text != "not";
  if (take_operator("(")) {
    step.arguments = INFLLM_TRY(arguments());
  } else if (is_name("is")) {
    return fail("tests cannot be chained with \"is\"");
  } else if (value || name) {
    ExpressionPtr operand = node(Kind::kChain);
    operand->operands.push_back(INFLLM_TRY(primary()));
    INFLLM_TRY(postfix(*operand, /*with_calls=*/true));
    step.arguments.positional.push_back(std::move(operand));
  }
  chain.steps.push_back(std::move(step));
  return {};
}

}  // namespace infllm::engine::jinja
