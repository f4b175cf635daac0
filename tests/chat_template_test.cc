// SPDX-License-Identifier: Apache-2.0
//
// Templates against jinja2: 1,000 conversations through every template of
// tests/golden/text/templates, several hundred snippets, and the budgets.
#include "infllm/engine/chat_template.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "infllm/engine/text_file.h"
#include "tests/support/source_folder.h"
#include "tests/support/text_golden.h"

namespace infllm::engine {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::ordered_json;
namespace fs = std::filesystem;

fs::path folder() { return infllm::testing::source_folder() / "tests/golden/text/templates"; }

std::string read(const std::string& name) {
  Result<std::string> text = read_text_file(folder() / name, std::size_t{8} << 20);
  EXPECT_TRUE(text.ok()) << text.status().message();
  return text.ok() ? *text : std::string();
}

Result<std::string> render(std::string_view text, std::string_view messages = "[]",
                           const ChatTemplateOptions& options = {}) {
  const ChatTemplate parsed = INFLLM_TRY(ChatTemplate::parse(text));
  return parsed.render_json(messages, options);
}

std::string error(std::string_view text) { return render(text).status().message(); }

TEST(ChatTemplate, ThousandConversationsThroughEveryTemplate) {
  std::vector<Json> conversations;
  std::ifstream lines(folder() / "conversations.jsonl");
  for (std::string line; std::getline(lines, line);) conversations.push_back(Json::parse(line));
  ASSERT_GE(conversations.size(), 1000u);
  int templates = 0;
  for (const auto& entry : fs::directory_iterator(folder())) {
    if (entry.path().extension() != ".jinja") continue;
    ++templates;
    const std::string name = entry.path().stem();
    const std::vector<std::uint32_t> want = test::read_hashes(folder() / (name + ".hashes.txt"));
    ASSERT_EQ(want.size(), conversations.size());
    const Result<ChatTemplate> parsed = ChatTemplate::parse(read(name + ".jinja"));
    ASSERT_TRUE(parsed.ok()) << name << ": " << parsed.status().message();
    for (std::size_t i = 0; i < want.size(); ++i) {
      const Json& c = conversations[i];
      ChatTemplateOptions options;
      options.add_generation_prompt = c["add_generation_prompt"].get<bool>();
      if (!c["enable_thinking"].is_null()) {
        options.enable_thinking = c["enable_thinking"].get<bool>();
      }
      options.special_tokens = {{"bos_token", "<s>"}, {"eos_token", "</s>"}};
      options.variables_json = c["variables"].dump();
      const Result<std::string> text = parsed->render_json(c["messages"].dump(), options);
      const std::uint32_t got = text.ok() ? test::hash_bytes(*text) : 0;
      ASSERT_EQ(got, want[i]) << name << ", conversation " << i << ": " << c.dump() << "\n"
                              << (text.ok() ? *text : text.status().message());
    }
  }
  EXPECT_GE(templates, 12);
}

TEST(ChatTemplate, Snippets) {
  ChatTemplateOptions options;
  options.variables_json = read("snippet_variables.json");
  const Json snippets = Json::parse(read("snippets.json"));
  ASSERT_GE(snippets.size(), 400u);
  for (const Json& snippet : snippets) {
    const auto text = snippet["template"].get<std::string>();
    const Result<std::string> got = render(text, "[]", options);
    if (snippet["output"].is_null()) {
      EXPECT_FALSE(got.ok()) << text << "\n" << *got;
      continue;
    }
    EXPECT_TRUE(got.ok()) << text << "\n" << got.status().message();
    if (got.ok()) EXPECT_EQ(*got, snippet["output"].get<std::string>()) << text;
  }
}

TEST(ChatTemplate, MessagesAndOptions) {
  const Result<ChatTemplate> chat = ChatTemplate::parse(
      "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
      "{{ enable_thinking }}{{ tools | tojson if tools }}{{ add_generation_prompt }}");
  ASSERT_TRUE(chat.ok());
  EXPECT_EQ(*chat->render({{"user", "a"}, {"assistant", "b\xFF"}}, {}),
            "user:a;assistant:b\xEF\xBF\xBD;True");
  ChatTemplateOptions options;
  options.add_generation_prompt = false;
  options.enable_thinking = false;
  options.special_tokens["bos_token"] = "<s>";
  options.variables_json = R"({"tools": [{"z": 1, "a": 2}]})";
  EXPECT_EQ(*chat->render({}, options), "<s>False[{\"z\": 1, \"a\": 2}]False");
  options.variables_json = "[1]";
  EXPECT_THAT(chat->render({}, options).status().message(), HasSubstr("not a JSON object"));
  EXPECT_THAT(chat->render_json("{}", {}).status().message(), HasSubstr("not a JSON array"));
}

TEST(ChatTemplate, TimeIsTheCallersOrUnknown) {
  constexpr const char* kText =
      "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y %H:%M %%') }}{% else %}?{% endif "
      "%}";
  EXPECT_EQ(*render(kText), "?");
  ChatTemplateOptions options;
  options.now = 1'700'000'000;
  EXPECT_EQ(*render(kText, "[]", options), "14 Nov 2023 22:13 %");
  EXPECT_THAT(render("{{ strftime_now('%99999d') }}", "[]", options).status().message(),
              HasSubstr("the format may use"));
}

TEST(ChatTemplate, ErrorsNameTheLineAndTheReason) {
  EXPECT_EQ(error("a\nb {{ x.y }}"), "chat template line 2: 'x' is undefined");
  EXPECT_EQ(error("\n\n{{ raise_exception('only pairs') }}"),
            "chat template line 3: the template refuses this conversation: only pairs");
  EXPECT_EQ(error("{% if 1 %}\n"),
            "chat template line 1: expected {% endif %}, found the end of the template");
  EXPECT_EQ(error("{{ 1 +\n }}"),
            "chat template line 2: expected an expression, found the end of the tag");
  EXPECT_THAT(error("{% include 'x' %}"), HasSubstr("\"include\" is unknown, out of place or not"));
  EXPECT_THAT(error("{{ 'a' | nothing }}"), HasSubstr("nothing: no such filter"));
  EXPECT_THAT(error("{{ 'a' is nothing }}"), HasSubstr("nothing: no such test"));
  EXPECT_THAT(error("{{ '\xC3\xA9'.upper() }}"), HasSubstr("ASCII text only"));
  EXPECT_THAT(error("{{ {1: 2} }}"), HasSubstr("keys of a dict are strings here"));
  EXPECT_THAT(error("\xFF"), HasSubstr("not UTF-8"));
  EXPECT_THAT(error("{{ 9223372036854775807 + 1 }}"), HasSubstr("more than 64 bits"));
  EXPECT_THAT(error("{{ messages.append(1) }}"), HasSubstr("no attribute 'append'"));
}

TEST(ChatTemplate, BudgetsEndHostileTemplates) {
  const std::string steps = "needs more steps or memory than its budget allows";
  const std::string loops =
      "{% for a in range(1000) %}{% for b in range(1000) %}{% for c in "
      "range(1000) %}{% endfor %}{% endfor %}{% endfor %}";
  EXPECT_THAT(error(loops), HasSubstr(steps));
  EXPECT_THAT(error("{{ 'x' * 1000000000000 }}"), HasSubstr(steps));
  EXPECT_THAT(error("{{ [1] * 1000000000000 }}"), HasSubstr(steps));
  EXPECT_THAT(
      error("{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
            "{% endfor %}"),
      HasSubstr(steps));
  EXPECT_THAT(
      error("{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}"
            "{% endfor %}{{ n.l }}"),
      HasSubstr(steps));
  EXPECT_THAT(error("{% set n = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set n.a = "
                    "[n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}"),
              HasSubstr(steps));
  EXPECT_THAT(error("{% set n = namespace(l=[]) %}{% for i in range(99999) %}{% set n.l = [n.l] %}"
                    "{% endfor %}"),
              HasSubstr("at most 128 levels deep"));
  EXPECT_THAT(error("{% for i in range(9999) %}{{ 'x' * 999 }}{% endfor %}"),
              HasSubstr("more than 4194304 bytes of output"));
  EXPECT_THAT(error("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
              HasSubstr("deeper than 32 levels"));
  EXPECT_THAT(error("{% set n = namespace(a=1) %}{% set n.a = n %}"), HasSubstr("plain data only"));
  const std::pair<std::string, std::string> nested[] = {
      {"(", ")"}, {"[", "]"}, {"{'a':", "}"}, {"not ", ""}, {"-", ""}, {"a if b else ", ""}};
  for (const auto& [open, close] : nested) {
    std::string text = "1";
    for (int i = 0; i < 5000; ++i) text = open + text + close;
    EXPECT_THAT(error("{{ " + text + " }}"), HasSubstr("nested deeper than 32 levels")) << open;
  }
  std::string blocks;
  for (int i = 0; i < 5000; ++i) blocks += "{% if 1 %}";
  EXPECT_THAT(error(blocks), HasSubstr("nested deeper than 32 levels"));
  EXPECT_THAT(error(std::string(64 * 1024 + 1, 'x')), HasSubstr("expected at most 65536"));
  // Long flat chains are fine.
  std::string flat = "{{ 1";
  for (int i = 0; i < 10000; ++i) flat += " + 1";
  EXPECT_EQ(*render(flat + " }}"), "10001");
}

}  // namespace
}  // namespace infllm::engine
