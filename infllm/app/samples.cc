// SPDX-License-Identifier: Apache-2.0
#include "infllm/app/samples.h"

#include <fmt/format.h>

#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "infllm/core/json.h"

namespace infllm::app {
namespace {

Result<std::string> text_field(const nlohmann::json& object, const char* name) {
  const auto field = object.find(name);
  if (field == object.end() || !field->is_string()) {
    return data_error(fmt::format("\"{}\" is missing or no text", name));
  }
  return field->get<std::string>();
}

Result<Sample> parse_sample(const std::string& line) {
  const nlohmann::json object = INFLLM_TRY(
      parse_json(line, {.what = "the line", .max_bytes = std::size_t{256} << 20, .max_depth = 8}));
  if (!object.is_object()) return data_error("expected an object");
  Sample sample;
  const auto id = object.find("id");
  if (id != object.end()) sample.id = id->is_string() ? id->get<std::string>() : id->dump();
  const auto length = object.find("length");
  if (length == object.end() || !length->is_number_unsigned() ||
      length->get<std::uint64_t>() > std::numeric_limits<std::int32_t>::max()) {
    return data_error("\"length\" is missing or no count of tokens");
  }
  sample.length = length->get<std::int32_t>();
  sample.document = INFLLM_TRY(text_field(object, "document"));
  const auto questions = object.find("questions");
  if (questions == object.end() || !questions->is_array() || questions->empty()) {
    return data_error("\"questions\" is missing, empty or no list");
  }
  for (const nlohmann::json& entry : *questions) {
    if (!entry.is_object()) return data_error("a question is no object");
    sample.questions.push_back({.task = INFLLM_TRY(text_field(entry, "task")),
                                .question = INFLLM_TRY(text_field(entry, "question")),
                                .answer = INFLLM_TRY(text_field(entry, "answer"))});
  }
  return sample;
}

}  // namespace

Result<std::vector<Sample>> read_samples(const std::string& path, std::int32_t limit) {
  if (std::error_code error; std::filesystem::is_directory(path, error)) {
    return invalid_argument(fmt::format("{}: is a folder, expected a file of JSON lines", path));
  }
  std::ifstream file(path);
  if (!file) return not_found(fmt::format("{}: no such file, or it cannot be read", path));
  std::vector<Sample> samples;
  int number = 0;
  for (std::string line; std::getline(file, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    if (limit > 0 && static_cast<std::int32_t>(samples.size()) == limit) break;
    Result<Sample> sample = parse_sample(line);
    if (!sample.ok()) return sample.status().with_context(fmt::format("{}:{}", path, number));
    samples.push_back(std::move(sample).value());
  }
  if (samples.empty()) return data_error(fmt::format("{}: no samples in it", path));
  return samples;
}

}  // namespace infllm::app
