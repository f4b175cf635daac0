// SPDX-License-Identifier: Apache-2.0
//
// The expression half of the parser, which the statement half (jinja_parser.cc) builds on.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "infllm/engine/jinja_ast.h"
#include "infllm/engine/jinja_lexer.h"
#include "infllm/engine/jinja_parser.h"

namespace infllm::engine::jinja {

class ExpressionParser {
 public:
  explicit ExpressionParser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

 protected:
  using Kind = Expression::Kind;

  const Token& peek(std::size_t ahead = 0) const {
    return tokens_[std::min(at_ + ahead, tokens_.size() - 1)];
  }
  const Token& take() { return tokens_[at_ + 1 < tokens_.size() ? at_++ : at_]; }
  bool is_operator(std::string_view text) const {
    return peek().kind == Token::Kind::kOperator && peek().text == text;
  }
  bool is_name(std::string_view text) const {
    return peek().kind == Token::Kind::kName && peek().text == text;
  }
  bool take_operator(std::string_view text) { return is_operator(text) && (take(), true); }
  bool take_name(std::string_view text) { return is_name(text) && (take(), true); }
  Status fail(std::string_view reason) const { return template_error(peek().line, reason); }
  Status unexpected(std::string_view expected) const;
  Status expect_operator(std::string_view text);
  Result<std::string> expect_identifier(std::string_view what);

  Result<ExpressionPtr> expression(bool with_condition = true);
  // One expression, or several with commas between them as a tuple.
  Result<ExpressionPtr> tuple_or_expression(bool with_condition = true);
  Result<Arguments> arguments();  // after "("
  // Filters alone: "|" comes before each but, when `first_bare`, the first.
  Status filters(Expression& chain, bool first_bare);

  // Counts a level of nesting while it lives.
  class Level {
   public:
    explicit Level(int& depth) : depth_(depth) { ++depth_; }
    ~Level() { --depth_; }
    Level(const Level&) = delete;
    Level& operator=(const Level&) = delete;

   private:
    int& depth_;
  };
  Status check_depth() const;

  int depth_ = 0;

 private:
  using Parse = Result<ExpressionPtr> (ExpressionParser::*)();

  ExpressionPtr node(Kind kind) const;
  Result<ExpressionPtr> joined(Kind kind, std::string_view word, Parse operand);
  Result<ExpressionPtr> chained(Kind kind, std::initializer_list<std::string_view> operators,
                                Parse operand);
  Result<ExpressionPtr> disjunction();
  Result<ExpressionPtr> conjunction();
  Result<ExpressionPtr> negation();
  Result<ExpressionPtr> comparison();
  Result<ExpressionPtr> sum();
  Result<ExpressionPtr> concatenation();
  Result<ExpressionPtr> product();
  Result<ExpressionPtr> power();
  Result<ExpressionPtr> unary();
  Result<ExpressionPtr> signed_operand(bool with_filters);
  Result<ExpressionPtr> primary();
  Result<ExpressionPtr> parenthesis();
  Result<ExpressionPtr> list();
  Result<ExpressionPtr> dict();
  Result<ExpressionPtr> chain(ExpressionPtr base, bool with_filters);
  Status postfix(Expression& chain, bool with_calls);
  Status subscript(Step& step);
  Status test(Expression& chain);

  std::vector<Token> tokens_;
  std::size_t at_ = 0;
};

}  // namespace infllm::engine::jinja
