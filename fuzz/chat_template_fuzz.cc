// SPDX-License-Identifier: Apache-2.0
//
// Any bytes as a chat template, rendered over a conversation that has a bit of everything: an error
// or valid UTF-8 within the budgets, and the same twice.
#include <cstdint>
#include <string_view>

#include "infllm/core/status.h"
#include "infllm/engine/chat_template.h"
#include "infllm/engine/utf8.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace infllm::engine;
  if (size > 8 * 1024) return 0;
  const auto chat =
      ChatTemplate::parse(std::string_view(reinterpret_cast<const char*>(data), size));
  if (!chat.ok()) return 0;
  const char* messages = R"([{"role": "system", "content": "Be \"brief\"."},
    {"role": "user", "content": [{"type": "text", "text": "a\u00e9\ud83d\ude00"}, {"type": "image"}]},
    {"role": "assistant", "content": "<think>x</think> y", "tool_calls": [{"function": {"name": "f",
     "arguments": {"n": 1, "x": 2.5, "l": [1, null, true], "d": {}}}}]}, {"role": "tool", "content": null}])";
  ChatTemplateOptions options;
  options.enable_thinking = size % 2 == 0;
  options.special_tokens = {{"bos_token", "<s>"}, {"eos_token", "</s>"}};
  options.variables_json =
      R"({"s": "a b", "n": 7, "f": 0.5, "l": [3, 1, 2], "d": {"k": "v"}, "no": null})";
  options.now = 1'700'000'000;
  // An input of a few hundred bytes can spend the whole budget, and that is long under sanitizers.
  options.limits.steps = 20'000;
  options.limits.work_bytes = 1 << 20;
  const auto text = chat->render_json(messages, options);
  if (text.ok()) {
    INFLLM_CHECK(utf8_valid(*text), "rendered text is no UTF-8");
    INFLLM_CHECK(*chat->render_json(messages, options) == *text, "two renderings differ");
  }
  return 0;
}
