// SPDX-License-Identifier: Apache-2.0
//
// + - * / // % ** as Python has them, but for integers, which end at 64 bits with an error.
#pragma once

#include <string_view>

#include "infllm/core/status.h"
#include "infllm/engine/jinja_call.h"

namespace infllm::engine::jinja {

Result<Value> calculate(const Call& call, std::string_view op, const Value& a, const Value& b);

}  // namespace infllm::engine::jinja
