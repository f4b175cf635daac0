// SPDX-License-Identifier: Apache-2.0
//
// Typed, ranged reads from one JSON object, with messages that name the field.
//
//   JsonFields fields(object, "config.json");
//   std::int32_t layers = INFLLM_TRY(fields.integer("num_hidden_layers", {.min = 1, .max = 1024}));
//
// "config.json: num_hidden_layers is 0, expected an integer from 1 to 1024"
// A null counts as absent, as in the Python config classes.
#pragma once

#include <cstdint>
#include <limits>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "infllm/core/status.h"

namespace infllm::model {

struct IntegerField {
  std::int32_t min = 0;
  std::int32_t max = std::numeric_limits<std::int32_t>::max();
  std::optional<std::int32_t> fallback;  // when absent; none: the field is required
};

struct NumberField {
  double min = 0;
  double max = 0;
  std::optional<double> fallback;
};

class JsonFields {
 public:
  // `object` must be a JSON object and outlive the reader; `path` names it in messages.
  JsonFields(const nlohmann::json& object, std::string path)
      : object_(object), path_(std::move(path)) {}

  bool has(std::string_view name) const { return find(name) != nullptr; }
  bool is_null(std::string_view name) const;  // present, and null
  // Null when absent or null.
  const nlohmann::json* find(std::string_view name) const;

  Result<std::int32_t> integer(std::string_view name, const IntegerField& field) const;
  Result<double> number(std::string_view name, const NumberField& field) const;
  Result<bool> boolean(std::string_view name, bool fallback) const;
  Result<std::string> text(std::string_view name, std::string_view fallback) const;
  // Exactly `size` positive finite numbers.
  Result<std::vector<float>> factors(std::string_view name, std::size_t size) const;
  // One token id or a list of at most 64, each in [0, limit); empty when absent.
  Result<std::vector<std::int32_t>> tokens(std::string_view name, std::int32_t limit) const;
  // The object under `name`, or null when absent. Anything else is an error.
  Result<const nlohmann::json*> object(std::string_view name) const;

  // "config.json: name is <found>, expected <expected>".
  Status unexpected(std::string_view name, std::string_view expected) const;

 private:
  const nlohmann::json& object_;
  std::string path_;
};

}  // namespace infllm::model
