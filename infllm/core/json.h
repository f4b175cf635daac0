// SPDX-License-Identifier: Apache-2.0
//
// JSON from outside, behind a guard. nlohmann::json parses any nesting depth but destroys and dumps
// recursively, so hostile depth would overflow the stack: the guard measures size and depth, and
// refuses duplicate keys, before a document object exists.
//
//   nlohmann::json config = INFLLM_TRY(parse_json(text, {.what = "config.json"}));
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

#include "infllm/core/status.h"

namespace infllm {

struct JsonLimits {
  std::string what = "JSON";                     // names the document in messages
  std::size_t max_bytes = std::size_t{8} << 20;  // of text
  int max_depth = 64;                            // of nested arrays and objects
  std::int64_t max_values = 4'000'000;           // of scalars, arrays and objects together
};

// The document, or kDataError that names the byte, the limit or the duplicated key.
Result<nlohmann::json> parse_json(std::string_view text, const JsonLimits& limits);

}  // namespace infllm
