// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <charconv>
#include <nlohmann/json.hpp>

#include "infllm/app/commands.h"
#include "infllm/app/prompt.h"
#include "infllm/app/report.h"
#include "infllm/app/signals.h"
#include "infllm/model/checkpoint.h"

namespace infllm::app {
namespace {

// Numbers between spaces, commas and brackets, so that the output of `tokenize` can come back in.
Result<std::vector<std::int32_t>> parse_ids(const std::string& text, std::int32_t vocab_size) {
  std::vector<std::int32_t> ids;
  const char* at = text.data();
  const char* end = at + text.size();
  constexpr std::string_view kBetween = " \t\r\n,[]";
  while (at < end) {
    if (kBetween.find(*at) != std::string_view::npos) {
      ++at;
      continue;
    }
    std::int32_t id = 0;
    const auto [last, error] = std::from_chars(at, end, id);
    if (error != std::errc() || id < 0 || id >= vocab_size) {
      const std::string_view rest(at, static_cast<std::size_t>(end - at));
      return invalid_argument(fmt::format("\"{:.20}\" is no token id; ids are numbers from 0 to {}",
                                          rest.substr(0, rest.find_first_of(kBetween)),
                                          vocab_size - 1));
    }
    ids.push_back(id);
    at = last;
  }
  return ids;
}

Status tokenize(const Options& options) {
  INFLLM_TRY(model::check_checkpoint_folder(options.model.path));
  const engine::Tokenizer tokenizer = INFLLM_TRY(engine::Tokenizer::load(options.model.path));
  const std::string text = INFLLM_TRY(read_text(options.prompt));
  std::vector<std::int32_t> ids;
  if (options.decode) {
    ids = INFLLM_TRY(parse_ids(text, tokenizer.vocab_size()));
  } else {
    const bool special = options.prompt.chat;  // --no-special clears it
    ids = tokenizer.encode(text, {.add_bos = special, .parse_special = special});
  }
  std::string out;
  if (options.json) {
    nlohmann::json json = {{"count", ids.size()}};
    if (!options.count_only) {
      std::vector<std::string> pieces;
      for (const std::int32_t id : ids) pieces.emplace_back(tokenizer.piece(id));
      json["ids"] = ids;
      json["pieces"] = pieces;
      if (options.decode) json["text"] = tokenizer.decode(ids);
    }
    out = dump(json);
  } else if (options.count_only) {
    out = fmt::format("{}", ids.size());
  } else if (options.decode) {
    out = tokenizer.decode(ids);
  } else {
    out = fmt::format("{}", fmt::join(ids, " "));
  }
  return write_stdout(out + "\n");
}

}  // namespace

int tokenize_command(const Options& options) {
  const Status status = tokenize(options);
  return status.ok() ? kExitOk : report_failure(status);
}

}  // namespace infllm::app
