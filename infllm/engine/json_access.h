// SPDX-License-Identifier: Apache-2.0
//
// Typed look-ups in a JSON object from outside, with messages that name the document and the place.
// For source files only: it includes the whole of nlohmann/json.
#pragma once

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "infllm/core/status.h"

namespace infllm::engine {

// The member `key`, or null when the value is no object or has no such member.
inline const nlohmann::json& member(const nlohmann::json& object, const char* key) {
  static const nlohmann::json null;
  if (!object.is_object()) return null;
  const auto found = object.find(key);
  return found == object.end() ? null : *found;
}

inline Status wrong_type(std::string_view where, const char* key, const nlohmann::json& value,
                         const char* expected) {
  return data_error(
      fmt::format("{}: \"{}\" is a {}, expected {}", where, key, value.type_name(), expected));
}

// A missing or null member yields `fallback`.
inline Result<std::string> string_member(const nlohmann::json& object, const char* key,
                                         std::string_view where, std::string fallback = "") {
  const nlohmann::json& value = member(object, key);
  if (value.is_null()) return fallback;
  if (!value.is_string()) return wrong_type(where, key, value, "a string");
  return value.get<std::string>();
}

inline Result<bool> bool_member(const nlohmann::json& object, const char* key,
                                std::string_view where, bool fallback) {
  const nlohmann::json& value = member(object, key);
  if (value.is_null()) return fallback;
  if (!value.is_boolean()) return wrong_type(where, key, value, "true or false");
  return value.get<bool>();
}

// A token id: an integer in [0, limit).
inline Result<std::int32_t> id_value(const nlohmann::json& value, std::string_view where,
                                     std::int32_t limit) {
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() >= std::uint64_t(limit)) {
    return data_error(fmt::format("{}: expected an id from 0 to {}, found a {}{}", where, limit - 1,
                                  value.type_name(), value.is_number() ? " outside of that" : ""));
  }
  return static_cast<std::int32_t>(value.get<std::uint64_t>());
}

}  // namespace infllm::engine
