// SPDX-License-Identifier: Apache-2.0
//
// Text from a file as it may stand in a message: quoted, in ASCII, of bounded length.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace infllm::model {

inline std::string printable(const nlohmann::json& value) {
  if (value.is_array()) return "a list of " + std::to_string(value.size());
  if (value.is_object()) return "an object";
  constexpr std::size_t kMaxBytes = 160;
  std::string text =
      value.dump(-1, ' ', /*ensure_ascii=*/true, nlohmann::json::error_handler_t::replace);
  if (text.size() > kMaxBytes) text = text.substr(0, kMaxBytes - 3) + "...";
  return text;
}

}  // namespace infllm::model
