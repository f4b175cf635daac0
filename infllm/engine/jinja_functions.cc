// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/jinja_functions.h"

#include <ctime>

#include "infllm/engine/jinja_lexer.h"

namespace infllm::engine::jinja {
namespace {

constexpr std::int64_t kMaxRange = 100'000;  // the sandbox of Jinja has the same limit

Result<Value> range(const Call& call) {
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"start", "stop", "step"}));
  for (const Value& value : call.positional) {
    if (!value.integer()) return call.fail("needs integers");
  }
  if (call.positional.empty()) return call.fail("needs a number");
  const bool one = call.positional.size() == 1;
  const std::int64_t start = one ? 0 : *bound[0].integer();
  const std::int64_t stop = *bound[one ? 0 : 1].integer();
  const std::int64_t step = bound[2].integer().value_or(1);
  if (step == 0) return call.fail("the step must not be zero");
  std::vector<Value> items;
  for (std::int64_t i = start; step > 0 ? i < stop : i > stop;) {
    if (static_cast<std::int64_t>(items.size()) == kMaxRange) {
      return call.fail(fmt::format("more than {} numbers", kMaxRange));
    }
    items.emplace_back(i);
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  return call.list(std::move(items));
}

Result<Value> name_space(const Call& call) {
  auto space = std::make_shared<Namespace>();
  const auto put = [&](const std::string& key, const Value& value) -> Status {
    if (!value.is_data()) return call.fail("a namespace holds plain data only");
    if (key.starts_with('_')) return call.fail("a name in a namespace may not begin with \"_\"");
    space->values[key] = value;
    return {};
  };
  if (call.positional.size() > 1) return call.fail("at most one positional argument");
  if (!call.positional.empty()) {
    const Dict* dict = call.positional[0].dict();
    if (dict == nullptr) return call.fail("the positional argument must be a dict");
    for (const auto& [key, value] : dict->items) INFLLM_TRY(put(key, value));
  }
  for (const auto& [key, value] : call.named) INFLLM_TRY(put(key, value));
  return Value(std::move(space));
}

Result<Value> dict(const Call& call) {
  if (call.positional.size() > 1) return call.fail("at most one positional argument");
  Dict out;
  if (!call.positional.empty()) {
    const Dict* from = call.positional[0].dict();
    if (from == nullptr) return call.fail("the positional argument must be a dict");
    const auto count = static_cast<std::int64_t>(from->items.size());
    if (!call.budget.spend(count, count * 64)) return call.out_of_budget();
    out = *from;
  }
  for (const auto& [key, value] : call.named) out.set(key, value);
  if (std::optional<Value> made = make_dict(std::move(out))) return std::move(*made);
  return call.fail(
      fmt::format("a dict holds plain data only, at most {} levels deep", kMaxValueDepth));
}

Result<Value> format_time(const Call& call, std::int64_t now) {
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"format"}));
  const std::string format = INFLLM_TRY(call.text(bound[0]));
  const auto seconds = static_cast<std::time_t>(now);
  std::tm time{};
  if (gmtime_r(&seconds, &time) == nullptr) return call.fail("the time is out of range");
  std::string out;
  for (std::size_t i = 0; i < format.size(); ++i) {
    if (format[i] != '%') {
      out += format[i];
      continue;
    }
    const char letter = ++i < format.size() ? format[i] : '\0';
    if (letter == '\0' || std::string_view("aAbBdHIjmMpSyY%").find(letter) == std::string::npos) {
      return call.fail("the format may use %a %A %b %B %d %H %I %j %m %M %p %S %y %Y %%");
    }
    const char one[] = {'%', letter, '\0'};
    char text[64];
    out.append(text, std::strftime(text, sizeof text, one, &time));
  }
  if (!call.budget.spend(1, static_cast<std::int64_t>(out.size()))) return call.out_of_budget();
  return Value(std::move(out));
}

}  // namespace

bool is_function(std::string_view name, bool has_time) {
  return name == "range" || name == "dict" || name == "namespace" || name == "raise_exception" ||
         (has_time && name == "strftime_now");
}

Result<Value> call_function(const Call& call, std::optional<std::int64_t> now) {
  if (call.name == "range") return range(call);
  if (call.name == "dict") return dict(call);
  if (call.name == "namespace") return name_space(call);
  if (call.name == "strftime_now" && now) return format_time(call, *now);
  const std::vector<Value> bound = INFLLM_TRY(call.bind({"message"}));
  return template_error(call.line, fmt::format("the template refuses this conversation: {:.1000}",
                                               INFLLM_TRY(call.text(bound[0]))));
}

}  // namespace infllm::engine::jinja
