// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/jinja_parser.h"

#include <fmt/format.h>

#include <algorithm>

#include "infllm/engine/jinja_parser_expression.h"

namespace infllm::engine::jinja {
namespace {

class Parser : public ExpressionParser {
 public:
  using ExpressionParser::ExpressionParser;

  Result<Block> run() {
    Block block = INFLLM_TRY(body({}));
    if (peek().kind != Token::Kind::kEnd)
      return fail(fmt::format("unexpected {{% {} %}}", ended_by_));
    return block;
  }

 private:
  using Kind = Statement::Kind;

  // Statements up to one of `ends`, whose name it leaves in ended_by_ and whose tag open.
  Result<Block> body(std::initializer_list<std::string_view> ends) {
    const Level level(depth_);
    INFLLM_TRY(check_depth());
    Block block;
    while (peek().kind != Token::Kind::kEnd) {
      if (peek().kind == Token::Kind::kText) {
        Statement text{.kind = Kind::kText, .line = peek().line};
        text.text = take().text;
        block.push_back(std::move(text));
      } else if (peek().kind == Token::Kind::kPrintBegin) {
        Statement print{.kind = Kind::kPrint, .line = take().line};
        print.expression = INFLLM_TRY(tuple_or_expression());
        if (peek().kind != Token::Kind::kPrintEnd) return unexpected("\"}}\"");
        take();
        block.push_back(std::move(print));
      } else {
        take();
        const int line = peek().line;
        const std::string name = INFLLM_TRY(expect_identifier("the name of a statement"));
        if (std::find(ends.begin(), ends.end(), name) != ends.end()) {
          ended_by_ = name;
          return block;
        }
        block.push_back(INFLLM_TRY(statement(name, line)));
      }
    }
    if (ends.size() > 0) {
      return unexpected(fmt::format("{{% {} %}}", *(ends.end() - 1)));
    }
    return block;
  }

  Status close() {
    if (peek().kind != Token::Kind::kBlockEnd) return unexpected("\"%}\"");
    take();
    return {};
  }

  Result<Statement> statement(const std::string& name, int line) {
    Statement out{.kind = Kind::kText, .line = line};
    if (name == "if") {
      INFLLM_TRY(if_statement(out));
    } else if (name == "for") {
      INFLLM_TRY(for_statement(out));
    } else if (name == "set") {
      INFLLM_TRY(set_statement(out));
    } else if (name == "macro") {
      INFLLM_TRY(macro_statement(out));
    } else if (name == "call") {
      INFLLM_TRY(call_statement(out));
    } else if (name == "filter") {
      out.kind = Kind::kFilterBlock;
      INFLLM_TRY(start_filters(out, /*first_bare=*/true));
      INFLLM_TRY(inner(out, "endfilter"));
    } else if (name == "with") {
      INFLLM_TRY(with_statement(out));
    } else if (name == "generation") {
      out.kind = Kind::kScope;
      INFLLM_TRY(inner(out, "endgeneration"));
    } else if (name == "break" || name == "continue") {
      if (loops_ == 0) return template_error(line, fmt::format("{} outside of a loop", name));
      out.kind = name == "break" ? Kind::kBreak : Kind::kContinue;
      INFLLM_TRY(close());
    } else {
      return template_error(
          line,
          fmt::format("statement \"{:.32}\" is unknown, out of place or not supported", name));
    }
    return out;
  }

  // "%}", the body, "{% end %}"
  Status inner(Statement& out, std::string_view end) {
    INFLLM_TRY(close());
    out.bodies.push_back(INFLLM_TRY(body({end})));
    return close();
  }

  Status if_statement(Statement& out) {
    out.kind = Kind::kIf;
    do {
      out.conditions.push_back(INFLLM_TRY(tuple_or_expression(/*with_condition=*/false)));
      INFLLM_TRY(close());
      out.bodies.push_back(INFLLM_TRY(body({"elif", "else", "endif"})));
    } while (ended_by_ == "elif");
    if (ended_by_ == "else") return inner(out, "endif");
    return close();
  }

  Status for_statement(Statement& out) {
    out.kind = Kind::kFor;
    const bool bracket = take_operator("(");
    do {
      out.targets.push_back(INFLLM_TRY(expect_identifier("the name of a loop variable")));
    } while (take_operator(","));
    if (bracket) INFLLM_TRY(expect_operator(")"));
    if (!take_name("in")) return unexpected("\"in\"");
    out.expression = INFLLM_TRY(tuple_or_expression(/*with_condition=*/false));
    if (take_name("if")) out.filter = INFLLM_TRY(expression());
    if (is_name("recursive")) return fail("recursive loops are not supported");
    INFLLM_TRY(close());
    ++loops_;
    Result<Block> loop = body({"else", "endfor"});
    --loops_;
    out.bodies.push_back(INFLLM_TRY(std::move(loop)));
    if (ended_by_ == "else") return inner(out, "endfor");
    return close();
  }

  Status set_statement(Statement& out) {
    const bool bracket = take_operator("(");
    do {
      std::string target = INFLLM_TRY(expect_identifier("the name of a variable"));
      if (!bracket && out.targets.empty() && take_operator(".")) {
        target += "." + INFLLM_TRY(expect_identifier("the name of an attribute"));
      }
      out.targets.push_back(std::move(target));
    } while (take_operator(","));
    if (bracket) INFLLM_TRY(expect_operator(")"));
    if (take_operator("=")) {
      out.kind = Kind::kSet;
      out.expression = INFLLM_TRY(tuple_or_expression());
      return close();
    }
    out.kind = Kind::kSetBlock;
    if (out.targets.size() != 1) return unexpected("\"=\"");
    INFLLM_TRY(start_filters(out, /*first_bare=*/false));
    return inner(out, "endset");
  }

  // A chain that has filters and gets its value when it runs.
  Status start_filters(Statement& out, bool first_bare) {
    out.expression = std::make_unique<Expression>();
    out.expression->kind = Expression::Kind::kChain;
    out.expression->line = out.line;
    return filters(*out.expression, first_bare);
  }

  Status parameters(MacroNode& macro) {
    while (!is_operator(")")) {
      macro.parameters.push_back(INFLLM_TRY(expect_identifier("the name of a parameter")));
      if (take_operator("=")) {
        macro.defaults.push_back(INFLLM_TRY(expression()));
      } else if (!macro.defaults.empty()) {
        return fail("a parameter without a default after one with a default");
      }
      if (!is_operator(")")) INFLLM_TRY(expect_operator(","));
    }
    take();
    return {};
  }

  // The body of a macro is no part of the loop around it.
  Status macro_body(Statement& out, std::string_view end) {
    INFLLM_TRY(close());
    const int loops = std::exchange(loops_, 0);
    Result<Block> block = body({end});
    loops_ = loops;
    out.macro->body = INFLLM_TRY(std::move(block));
    return close();
  }

  Status macro_statement(Statement& out) {
    out.kind = Kind::kMacro;
    out.macro = std::make_unique<MacroNode>();
    out.macro->name = INFLLM_TRY(expect_identifier("the name of the macro"));
    INFLLM_TRY(expect_operator("("));
    INFLLM_TRY(parameters(*out.macro));
    return macro_body(out, "endmacro");
  }

  Status call_statement(Statement& out) {
    out.kind = Kind::kCall;
    out.macro = std::make_unique<MacroNode>();
    out.macro->name = "caller";
    if (take_operator("(")) INFLLM_TRY(parameters(*out.macro));
    out.expression = INFLLM_TRY(expression());
    const Expression& call = *out.expression;
    if (call.kind != Expression::Kind::kChain || call.steps.back().kind != Step::Kind::kCall) {
      return fail("{% call %} needs a call of a macro");
    }
    return macro_body(out, "endcall");
  }

  Status with_statement(Statement& out) {
    out.kind = Kind::kWith;
    while (peek().kind != Token::Kind::kBlockEnd) {
      if (!out.targets.empty()) INFLLM_TRY(expect_operator(","));
      out.targets.push_back(INFLLM_TRY(expect_identifier("the name of a variable")));
      INFLLM_TRY(expect_operator("="));
      out.conditions.push_back(INFLLM_TRY(expression()));
    }
    return inner(out, "endwith");
  }

  std::string ended_by_;
  int loops_ = 0;
};

}  // namespace

Result<Block> parse(std::string_view source) {
  if (source.size() > kMaxTemplateBytes) {
    return data_error(fmt::format("chat template: {} bytes, expected at most {}", source.size(),
                                  kMaxTemplateBytes));
  }
  return Parser(INFLLM_TRY(lex(source))).run();
}

}  // namespace infllm::engine::jinja
