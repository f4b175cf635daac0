// SPDX-License-Identifier: Apache-2.0
//
// Tokens -> tree, with Jinja's precedence: conditional, or, and, not, comparison, + -, ~, * / // %,
// **, unary, then the chain of attributes, calls, filters and tests.
#pragma once

#include <string_view>

#include "infllm/core/status.h"
#include "infllm/engine/jinja_ast.h"

namespace infllm::engine::jinja {

inline constexpr std::size_t kMaxTemplateBytes = 64 * 1024;
inline constexpr int kMaxNesting = 32;  // of brackets, operators that nest, and blocks together

// kDataError names the line and the reason.
Result<Block> parse(std::string_view source);

}  // namespace infllm::engine::jinja
