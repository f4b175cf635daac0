// SPDX-License-Identifier: Apache-2.0
#include "infllm/core/json.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <unordered_set>
#include <vector>

namespace infllm {
namespace {

using Json = nlohmann::json;

// Walks the text once without building anything; stops at the first thing it dislikes.
class Guard : public Json::json_sax_t {
 public:
  explicit Guard(const JsonLimits& limits) : limits_(limits) {}

  bool null() override { return count(); }
  bool boolean(bool) override { return count(); }
  bool number_integer(number_integer_t) override { return count(); }
  bool number_unsigned(number_unsigned_t) override { return count(); }
  bool number_float(number_float_t, const string_t&) override { return count(); }
  bool string(string_t&) override { return count(); }
  bool binary(binary_t&) override { return count(); }
  bool start_object(std::size_t) override { return enter(); }
  bool start_array(std::size_t) override { return enter(); }
  bool end_object() override { return leave(); }
  bool end_array() override { return leave(); }
  bool key(string_t& name) override {
    if (keys_.back().insert(name).second) return true;
    problem_ = fmt::format("key \"{:.64}\" appears twice in one object", name);
    return false;
  }
  bool parse_error(std::size_t position, const std::string&, const Json::exception&) override {
    problem_ = fmt::format("not valid JSON at byte {}", position);
    return false;
  }

  const std::string& problem() const { return problem_; }

 private:
  bool count() {
    if (++values_ <= limits_.max_values) return true;
    problem_ = fmt::format("more than {} values", limits_.max_values);
    return false;
  }
  bool enter() {
    keys_.emplace_back();
    if (static_cast<int>(keys_.size()) > limits_.max_depth) {
      problem_ = fmt::format("nested deeper than {} levels", limits_.max_depth);
      return false;
    }
    return count();
  }
  bool leave() {
    keys_.pop_back();
    return true;
  }

  const JsonLimits& limits_;
  std::vector<std::unordered_set<std::string>> keys_;
  std::int64_t values_ = 0;
  std::string problem_;
};

}  // namespace

Result<Json> parse_json(std::string_view text, const JsonLimits& limits) {
  if (text.size() > limits.max_bytes) {
    return data_error(fmt::format("{}: {} bytes of JSON, expected at most {}", limits.what,
                                  text.size(), limits.max_bytes));
  }
  Guard guard(limits);
  if (!Json::sax_parse(text.begin(), text.end(), &guard)) {
    return data_error(fmt::format("{}: {}", limits.what, guard.problem()));
  }
  return Json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
}

}  // namespace infllm
