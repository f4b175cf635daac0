// SPDX-License-Identifier: Apache-2.0
#include "infllm/model/json_fields.h"

#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "infllm/model/printable.h"

namespace infllm::model {
namespace {

using Json = nlohmann::json;

constexpr std::size_t kMaxTokenList = 64;
constexpr double kMinFactor = 1e-6;
constexpr double kMaxFactor = 1e6;

// The integer that a JSON number is, if it is one and fits.
std::optional<std::int32_t> as_int32(const Json& value) {
  constexpr std::int64_t kMin = std::numeric_limits<std::int32_t>::min();
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
  if (value.is_number_unsigned()) {
    const auto number = value.get<std::uint64_t>();
    if (number > static_cast<std::uint64_t>(kMax)) return std::nullopt;
    return static_cast<std::int32_t>(number);
  }
  if (value.is_number_integer()) {
    const auto number = value.get<std::int64_t>();
    if (number < kMin || number > kMax) return std::nullopt;
    return static_cast<std::int32_t>(number);
  }
  return std::nullopt;
}

}  // namespace

const Json* JsonFields::find(std::string_view name) const {
  const auto it = object_.find(name);
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

bool JsonFields::is_null(std::string_view name) const {
  const auto it = object_.find(name);
  return it != object_.end() && it->is_null();
}

Status JsonFields::unexpected(std::string_view name, std::string_view expected) const {
  const Json* value = find(name);
  return data_error(fmt::format("{}: {} is {}, expected {}", path_, name,
                                value == nullptr ? "missing" : printable(*value), expected));
}

Result<std::int32_t> JsonFields::integer(std::string_view name, const IntegerField& field) const {
  const Json* value = find(name);
  if (value == nullptr && field.fallback) return *field.fallback;
  const std::optional<std::int32_t> number = value ? as_int32(*value) : std::nullopt;
  if (!number || *number < field.min || *number > field.max) {
    return unexpected(name, fmt::format("an integer from {} to {}", field.min, field.max));
  }
  return *number;
}

Result<double> JsonFields::number(std::string_view name, const NumberField& field) const {
  const Json* value = find(name);
  if (value == nullptr && field.fallback) return *field.fallback;
  const double number = value && value->is_number() ? value->get<double>() : std::nan("");
  if (!(number >= field.min && number <= field.max)) {
    return unexpected(name, fmt::format("a number from {} to {}", field.min, field.max));
  }
  return number;
}

Result<bool> JsonFields::boolean(std::string_view name, bool fallback) const {
  const Json* value = find(name);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) return unexpected(name, "true or false");
  return value->get<bool>();
}

Result<std::string> JsonFields::text(std::string_view name, std::string_view fallback) const {
  const Json* value = find(name);
  if (value == nullptr) return std::string(fallback);
  if (!value->is_string()) return unexpected(name, "a string");
  return value->get<std::string>();
}

Result<std::vector<float>> JsonFields::factors(std::string_view name, std::size_t size) const {
  const std::string expected = fmt::format("a list of {} positive numbers (head_dim / 2)", size);
  const Json* value = find(name);
  if (value == nullptr || !value->is_array() || value->size() != size) {
    return unexpected(name, expected);
  }
  std::vector<float> factors;
  for (const Json& element : *value) {
    const double factor = element.is_number() ? element.get<double>() : 0.0;
    if (!(factor >= kMinFactor && factor <= kMaxFactor)) {
      return data_error(fmt::format("{}: {}[{}] is {}, expected a number from {} to {}", path_,
                                    name, factors.size(), printable(element), kMinFactor,
                                    kMaxFactor));
    }
    factors.push_back(static_cast<float>(factor));
  }
  return factors;
}

Result<std::vector<std::int32_t>> JsonFields::tokens(std::string_view name,
                                                     std::int32_t limit) const {
  const Json* value = find(name);
  if (value == nullptr) return std::vector<std::int32_t>();
  const Status wrong = unexpected(
      name,
      fmt::format("a token id below {}, or a list of up to {} of them", limit, kMaxTokenList));
  const Json list = value->is_array() ? *value : Json::array({*value});
  if (list.size() > kMaxTokenList) return wrong;
  std::vector<std::int32_t> tokens;
  for (const Json& element : list) {
    const std::optional<std::int32_t> token = as_int32(element);
    if (!token || *token < 0 || *token >= limit) return wrong;
    tokens.push_back(*token);
  }
  return tokens;
}

Result<const Json*> JsonFields::object(std::string_view name) const {
  const Json* value = find(name);
  if (value != nullptr && !value->is_object()) return unexpected(name, "an object");
  return value;
}

}  // namespace infllm::model
