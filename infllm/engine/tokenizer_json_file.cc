// SPDX-License-Identifier: Apache-2.0
//
// Hugging Face tokenizer.json: the model, the added tokens and the post-processor. The steps around
// the model are read in tokenizer_json_steps.cc.
#include <fmt/format.h>

#include <unordered_map>

#include "infllm/core/json.h"
#include "infllm/engine/json_access.h"
#include "infllm/engine/tokenizer_files.h"
#include "infllm/engine/tokenizer_json_steps.h"

namespace infllm::engine {
namespace {

using Json = nlohmann::json;
constexpr std::size_t kMaxHoles = 4096;
using Vocabulary = std::unordered_map<std::string_view, std::int32_t>;

Status place_piece(const std::string& text, std::int32_t id, PieceType type, std::string_view where,
                   TokenizerSpec& spec) {
  if (text.size() > kMaxPieceBytes) {
    return data_error(fmt::format("{}: token {} has {} bytes, expected at most {}", where, id,
                                  text.size(), kMaxPieceBytes));
  }
  const auto slot = static_cast<std::size_t>(id);
  // Real vocabularies have few holes; without a limit, one large id in a tiny file would cost the
  // memory and time of a million pieces.
  if (slot > 4 * spec.pieces.size() + kMaxHoles) {
    return data_error(
        fmt::format("{}: id {} is far beyond the other {} pieces", where, id, spec.pieces.size()));
  }
  if (slot >= spec.pieces.size()) {
    spec.pieces.resize(slot + 1);
    spec.types.resize(slot + 1, PieceType::kUserDefined);
  }
  if (!spec.pieces[slot].empty()) {
    return data_error(fmt::format("{}: id {} is both \"{:.64}\" and \"{:.64}\"", where, id,
                                  spec.pieces[slot], text));
  }
  spec.pieces[slot] = text;
  spec.types[slot] = type;
  return {};
}

Status read_vocabulary(const Json& model, TokenizerSpec& spec) {
  const Json& vocab = member(model, "vocab");
  if (!vocab.is_object() || vocab.empty()) {
    return data_error("tokenizer.json: model.vocab is missing, empty or no object");
  }
  if (vocab.size() > static_cast<std::size_t>(kMaxVocabulary)) {
    return data_error(fmt::format("tokenizer.json: {} pieces, expected at most {}", vocab.size(),
                                  kMaxVocabulary));
  }
  spec.pieces.resize(vocab.size());  // ids count from 0, mostly without holes
  spec.types.resize(vocab.size(), PieceType::kUserDefined);
  for (const auto& [text, value] : vocab.items()) {
    const std::int32_t id =
        INFLLM_TRY(id_value(value, "tokenizer.json: model.vocab", kMaxVocabulary));
    INFLLM_TRY(place_piece(text, id, PieceType::kNormal, "tokenizer.json: model.vocab", spec));
  }
  return {};
}

// A merge is "left right" in older files and ["left", "right"] in newer ones.
Status split_merge(const Json& merge, std::size_t line, std::string& left, std::string& right) {
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
    left = merge[0].get<std::string>();
    right = merge[1].get<std::string>();
    return {};
  }
  if (merge.is_string()) {
    const auto& text = merge.get_ref<const std::string&>();
    const std::size_t space = text.find(' ');
    if (space != std::string::npos && text.find(' ', space + 1) == std::string::npos) {
      left = text.substr(0, space);
      right = text.substr(space + 1);
      return {};
    }
  }
  return data_error(fmt::format(
      "tokenizer.json: merge {} is neither \"left right\" nor [\"left\", \"right\"]", line));
}

Status read_merges(const Json& model, const Vocabulary& ids, TokenizerSpec& spec) {
  const Json& merges = member(model, "merges");
  if (!merges.is_array()) return wrong_type("tokenizer.json: model", "merges", merges, "an array");
  std::string left, right;
  std::int32_t rank = 0;
  for (std::size_t line = 0; line < merges.size(); ++line) {
    if (merges[line].is_string() &&
        merges[line].get_ref<const std::string&>().starts_with("#version")) {
      continue;
    }
    INFLLM_TRY(split_merge(merges[line], line, left, right));
    const auto left_id = ids.find(left);
    const auto right_id = ids.find(right);
    const auto result = ids.find(left + right);
    if (left_id == ids.end() || right_id == ids.end() || result == ids.end()) {
      return data_error(fmt::format(
          "tokenizer.json: merge {} joins \"{:.64}\" and \"{:.64}\", but the vocabulary lacks {}",
          line, left, right,
          left_id == ids.end()    ? "the first"
          : right_id == ids.end() ? "the second"
                                  : "the result"));
    }
    spec.merges.push_back({left_id->second, right_id->second, result->second, rank++});
  }
  return {};
}

Status read_model(const Json& model, TokenizerSpec& spec) {
  const std::string where = "tokenizer.json: model";
  const std::string type = INFLLM_TRY(string_member(model, "type", where, "BPE"));
  if (!model.is_object() || type != "BPE") {
    return unsupported(fmt::format("tokenizer.json: model type \"{:.32}\", expected \"BPE\"",
                                   model.is_object() ? type : model.type_name()));
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const std::string text = INFLLM_TRY(string_member(model, key, where));
    if (!text.empty()) {
      return unsupported(fmt::format("{}: \"{}\" is not supported", where, key));
    }
  }
  const Json& dropout = member(model, "dropout");
  if (!dropout.is_null() && dropout != 0) {
    return unsupported(where + ": \"dropout\" makes encoding random and is not supported");
  }
  spec.fuse_unk = INFLLM_TRY(bool_member(model, "fuse_unk", where, false));
  spec.byte_fallback = INFLLM_TRY(bool_member(model, "byte_fallback", where, false));
  spec.ignore_merges = INFLLM_TRY(bool_member(model, "ignore_merges", where, false));
  INFLLM_TRY(read_vocabulary(model, spec));

  Vocabulary ids;
  for (std::size_t id = 0; id < spec.pieces.size(); ++id) {
    ids.emplace(spec.pieces[id], static_cast<std::int32_t>(id));
  }
  const std::string unknown = INFLLM_TRY(string_member(model, "unk_token", where));
  if (!unknown.empty()) {
    const auto found = ids.find(unknown);
    if (found == ids.end()) {
      return data_error(
          fmt::format("{}: unk_token \"{:.64}\" is not in the vocabulary", where, unknown));
    }
    spec.unk_id = found->second;
  }
  return read_merges(model, ids, spec);
}

Status read_added_tokens(const Json& list, TokenizerSpec& spec) {
  if (list.is_null()) return {};
  if (!list.is_array()) return wrong_type("tokenizer.json", "added_tokens", list, "an array");
  Vocabulary ids;
  for (std::size_t id = 0; id < spec.pieces.size(); ++id) {
    ids.emplace(spec.pieces[id], static_cast<std::int32_t>(id));
  }
  std::vector<AddedToken> tokens;
  for (const Json& entry : list) {
    AddedToken token = INFLLM_TRY(read_added_token(entry, "tokenizer.json: added_tokens"));
    token.id =
        INFLLM_TRY(id_value(member(entry, "id"), "tokenizer.json: added_tokens", kMaxVocabulary));
    const auto found = ids.find(token.text);
    if (found != ids.end() && found->second != token.id) {
      return data_error(fmt::format(
          "tokenizer.json: added token \"{:.64}\" has id {}, but the vocabulary says {}",
          token.text, token.id, found->second));
    }
    tokens.push_back(std::move(token));
  }
  return add_tokens(tokens, "tokenizer.json: added_tokens", spec);
}

// The ids that one TemplateProcessing puts before and after the text.
Status read_template(const Json& processor, TokenizerSpec& spec) {
  const std::string where = "tokenizer.json: post_processor";
  const Json& single = member(processor, "single");
  if (!single.is_array()) return wrong_type(where, "single", single, "an array");
  bool before = true;
  for (const Json& part : single) {
    if (!member(part, "Sequence").is_null()) {
      if (!before) return unsupported(where + ": a template that repeats the text");
      before = false;
      continue;
    }
    const std::string name = INFLLM_TRY(string_member(member(part, "SpecialToken"), "id", where));
    const Json& ids = member(member(member(processor, "special_tokens"), name.c_str()), "ids");
    if (!ids.is_array()) {
      return data_error(fmt::format("{}: no ids for special token \"{:.64}\"", where, name));
    }
    for (const Json& id : ids) {
      (before ? spec.prefix_ids : spec.suffix_ids)
          .push_back(
              INFLLM_TRY(id_value(id, where, static_cast<std::int32_t>(spec.pieces.size()))));
    }
  }
  return {};
}

Status read_post_processor(const Json& processor, TokenizerSpec& spec) {
  if (processor.is_null()) return {};
  const std::string type =
      INFLLM_TRY(string_member(processor, "type", "tokenizer.json: post_processor"));
  if (type == "ByteLevel") return {};  // moves offsets only
  if (type == "TemplateProcessing") return read_template(processor, spec);
  if (type == "Sequence" && member(processor, "processors").is_array()) {
    for (const Json& inner : member(processor, "processors")) {
      INFLLM_TRY(read_post_processor(inner, spec));
    }
    return {};
  }
  return unsupported(fmt::format(
      "tokenizer.json: post_processor \"{:.32}\", expected TemplateProcessing or ByteLevel", type));
}

}  // namespace

Result<AddedToken> read_added_token(const Json& entry, std::string_view where) {
  AddedToken token;
  token.text = INFLLM_TRY(string_member(entry, "content", where));
  if (token.text.empty()) {
    return data_error(fmt::format("{}: an added token without \"content\"", where));
  }
  token.special = INFLLM_TRY(bool_member(entry, "special", where, false));
  token.single_word = INFLLM_TRY(bool_member(entry, "single_word", where, false));
  token.lstrip = INFLLM_TRY(bool_member(entry, "lstrip", where, false));
  token.rstrip = INFLLM_TRY(bool_member(entry, "rstrip", where, false));
  token.normalized = INFLLM_TRY(bool_member(entry, "normalized", where, !token.special));
  return token;
}

Status add_tokens(const std::vector<AddedToken>& tokens, std::string_view where,
                  TokenizerSpec& spec) {
  for (const AddedToken& token : tokens) {
    const auto slot = static_cast<std::size_t>(token.id);
    if (slot >= spec.pieces.size() || spec.pieces[slot] != token.text) {
      const PieceType type = token.special ? PieceType::kControl : PieceType::kUserDefined;
      INFLLM_TRY(place_piece(token.text, token.id, type, where, spec));
    }
    spec.added_tokens.push_back(token);
  }
  return {};
}

Result<TokenizerSpec> read_tokenizer_json(std::string_view text) {
  const Json file = INFLLM_TRY(parse_json(
      text, {.what = "tokenizer.json", .max_bytes = kMaxTokenizerBytes, .max_depth = 32}));
  if (!file.is_object()) return data_error("tokenizer.json: not a JSON object");
  TokenizerSpec spec;
  INFLLM_TRY(read_model(member(file, "model"), spec));
  INFLLM_TRY(read_added_tokens(member(file, "added_tokens"), spec));
  INFLLM_TRY(read_json_normalizer(member(file, "normalizer"), spec.normalizer));
  INFLLM_TRY(read_json_pre_tokenizer(member(file, "pre_tokenizer"), spec.pre_tokenizer));
  INFLLM_TRY(read_json_decoder(member(file, "decoder"), spec.decoder));
  INFLLM_TRY(read_post_processor(member(file, "post_processor"), spec));
  return spec;
}

}  // namespace infllm::engine
