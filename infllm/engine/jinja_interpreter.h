// SPDX-License-Identifier: Apache-2.0
//
// Runs a parsed template. It has no way to reach anything but the values it is given: no files, no
// clock, no objects of the host.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "infllm/core/status.h"
#include "infllm/engine/chat_template.h"
#include "infllm/engine/jinja_ast.h"

namespace infllm::engine::jinja {

struct RenderContext {
  std::map<std::string, Value> variables;
  std::optional<std::int64_t> now;  // seconds since 1970, UTC: makes strftime_now known
  RenderLimits limits;
};

// kDataError names the line and the reason; what raise_exception says is such a reason.
Result<std::string> render(const Block& block, const RenderContext& context);

}  // namespace infllm::engine::jinja
