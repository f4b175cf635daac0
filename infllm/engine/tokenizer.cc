// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <unordered_map>

#include "infllm/engine/added_tokens.h"
#include "infllm/engine/bpe.h"
#include "infllm/engine/normalizer.h"
#include "infllm/engine/pre_tokenizer.h"
#include "infllm/engine/text_file.h"
#include "infllm/engine/tokenizer_config.h"
#include "infllm/engine/tokenizer_files.h"
#include "infllm/engine/tokenizer_json_steps.h"
#include "infllm/engine/tokenizer_state.h"
#include "infllm/engine/utf8.h"

namespace infllm::engine {
namespace {

void replace_markers(std::string& text) {
  constexpr std::string_view kMarker = kSpaceMarker;
  std::string out;
  std::size_t at = 0;
  for (std::size_t hit; (hit = text.find(kMarker, at)) != std::string::npos;
       at = hit + kMarker.size()) {
    out.append(text, at, hit - at).append(" ");
  }
  text = out.append(text, at);
}

// "<0xNN>" -> the byte; -1 for any other piece.
int byte_of_piece(std::string_view piece) {
  if (piece.size() != 6 || !piece.starts_with("<0x") || piece[5] != '>') return -1;
  int value = 0;
  for (const char c : piece.substr(3, 2)) {
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                             : -1;
    if (digit < 0) return -1;
    value = value * 16 + digit;
  }
  return value;
}

// What a token adds to the text when it is not the first.
std::string bytes_of_piece(const DecoderSpec& spec, const std::string& piece, PieceType type,
                           bool sentencepiece) {
  if (spec.byte_level) {
    std::string bytes;
    for (std::size_t at = 0; at < piece.size();) {
      const Utf8Char c = utf8_at(piece, at);
      const int byte = byte_level_byte(c.code);
      if (byte < 0) return piece;  // an added token outside of the alphabet stands for itself
      bytes += static_cast<char>(byte);
      at += c.bytes;
    }
    return bytes;
  }
  const bool may_be_byte = spec.byte_fallback && (!sentencepiece || type == PieceType::kByte);
  if (const int byte = may_be_byte ? byte_of_piece(piece) : -1; byte >= 0) {
    return std::string(1, static_cast<char>(byte));
  }
  std::string bytes = piece;
  if (spec.marker_is_space) replace_markers(bytes);
  return bytes;
}

void push_unique(std::vector<std::int32_t>& ids, std::int32_t id) {
  if (id >= 0 && std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
}

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<State> state) : state_(std::move(state)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Result<Tokenizer> Tokenizer::create(TokenizerSpec spec) {
  auto state = std::make_unique<State>(std::move(spec));
  state->normalizer = INFLLM_TRY(Normalizer::create(state->spec));
  state->bpe.emplace(state->spec);
  const TokenizerSpec& s = state->spec;
  state->special.resize(s.pieces.size());
  const auto bytes_of = [&](std::size_t id, const std::string& piece) {
    return bytes_of_piece(s.decoder, piece, s.types[id], s.normalizer.sentencepiece);
  };
  for (std::size_t id = 0; id < s.pieces.size(); ++id) {
    state->text.push_back(bytes_of(id, s.pieces[id]));
    if (!s.pieces[id].empty()) state->ids.emplace(s.pieces[id], static_cast<std::int32_t>(id));
  }
  for (const AddedToken& token : s.added_tokens) {
    if (token.special) state->special[token.id] = true;
    // SentencePiece models know no normalized tokens: all are cut out of the text as it is.
    if (!token.normalized || s.normalizer.sentencepiece) {
      state->added_tokens.add(token, token.text);
      continue;
    }
    bool at_start = true;
    const std::string normalized = state->normalizer->apply(token.text, at_start);
    state->normalized_tokens.add(token, normalized);
    state->text[token.id] = bytes_of(token.id, normalized);
  }
  push_unique(state->eos_ids, s.eos_id);
  return Tokenizer(std::move(state));
}

Result<Tokenizer> Tokenizer::load(const std::filesystem::path& folder) {
  const TokenizerConfig config = INFLLM_TRY(read_tokenizer_config(folder));
  Result<std::string> json = read_text_file(folder / "tokenizer.json", kMaxTokenizerBytes);
  const bool has_json = json.status().code() != StatusCode::kNotFound;
  Result<std::string> model = has_json
                                  ? Result<std::string>(std::string())
                                  : read_text_file(folder / "tokenizer.model", kMaxTokenizerBytes);
  if (!has_json && model.status().code() == StatusCode::kNotFound) {
    return not_found(
        fmt::format("{}: neither tokenizer.json nor tokenizer.model", folder.string()));
  }
  const std::string file = INFLLM_TRY(has_json ? std::move(json) : std::move(model));
  TokenizerSpec spec =
      INFLLM_TRY(has_json ? read_tokenizer_json(file) : read_tokenizer_model(file));

  // Tokens that the file has already keep their flags from there.
  std::vector<AddedToken> more;
  for (const AddedToken& token : config.added_tokens) {
    const auto same = [&](const AddedToken& other) { return other.id == token.id; };
    if (std::none_of(spec.added_tokens.begin(), spec.added_tokens.end(), same)) {
      more.push_back(token);
    }
  }
  INFLLM_TRY(add_tokens(more, "tokenizer_config.json: added_tokens_decoder", spec));
  spec.normalizer.dummy_prefix_first_only = !config.legacy;

  const auto find = [&](const std::string& text) -> std::int32_t {
    const auto found = std::find(spec.pieces.begin(), spec.pieces.end(), text);
    return text.empty() || found == spec.pieces.end()
               ? -1
               : static_cast<std::int32_t>(found - spec.pieces.begin());
  };
  if (const std::int32_t id = find(config.bos_token); id >= 0) spec.bos_id = id;
  if (const std::int32_t id = find(config.eos_token); id >= 0) spec.eos_id = id;
  const auto bos = std::vector<std::int32_t>(spec.bos_id >= 0 ? 1 : 0, spec.bos_id);
  const auto eos = std::vector<std::int32_t>(spec.eos_id >= 0 ? 1 : 0, spec.eos_id);
  if (config.add_bos) spec.prefix_ids = *config.add_bos ? bos : std::vector<std::int32_t>();
  if (config.add_eos) spec.suffix_ids = *config.add_eos ? eos : std::vector<std::int32_t>();
  // A file that puts one id in front of every text thereby names its bos.
  if (spec.bos_id < 0 && spec.prefix_ids.size() == 1) spec.bos_id = spec.prefix_ids[0];

  Tokenizer tokenizer = INFLLM_TRY(create(std::move(spec)));
  State& state = *tokenizer.state_;
  for (const std::int32_t id : config.eos_ids) {
    if (id >= tokenizer.vocab_size()) {
      return data_error(fmt::format("generation_config.json: eos_token_id {} is not below {}", id,
                                    tokenizer.vocab_size()));
    }
    push_unique(state.eos_ids, id);
  }
  state.chat_templates = config.chat_templates;
  const auto name_token = [&](const char* name, const std::string& text, std::int32_t id) {
    const std::string value = text.empty() ? std::string(tokenizer.piece(id)) : text;
    if (!value.empty()) state.special_tokens[name] = value;
  };
  name_token("bos_token", config.bos_token, state.spec.bos_id);
  name_token("eos_token", config.eos_token, state.spec.eos_id);
  name_token("unk_token", config.unk_token, state.spec.unk_id);
  name_token("pad_token", config.pad_token, -1);
  return tokenizer;
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, EncodeOptions options) const {
  const State& s = *state_;
  std::string repaired;
  if (!s.spec.normalizer.sentencepiece && !utf8_valid(text))
    text = repaired = utf8_repair(text, Utf8Repair::kPerByte);

  std::vector<std::int32_t> ids;
  if (options.add_bos) ids = s.spec.prefix_ids;
  for (const AddedTokens::Part& part : s.added_tokens.split(text, options.parse_special)) {
    if (part.id >= 0) {
      ids.push_back(part.id);
      continue;
    }
    bool at_start = part.text.data() == text.data();
    const std::string normalized = s.normalizer->apply(part.text, at_start);
    for (const AddedTokens::Part& inner :
         s.normalized_tokens.split(normalized, options.parse_special)) {
      if (inner.id >= 0) {
        ids.push_back(inner.id);
      } else if (s.spec.normalizer.sentencepiece) {
        s.bpe->encode(inner.text, ids);
      } else {
        const bool first = at_start && inner.text.data() == normalized.data();
        for (const std::string& word : pre_tokenize(s.spec.pre_tokenizer, inner.text, first)) {
          s.bpe->encode(word, ids);
        }
      }
    }
  }
  if (options.add_bos) ids.insert(ids.end(), s.spec.suffix_ids.begin(), s.spec.suffix_ids.end());
  return ids;
}

std::int32_t Tokenizer::id_of(std::string_view text) const {
  const auto found = state_->ids.find(text);
  return found == state_->ids.end() ? -1 : found->second;
}

std::string_view Tokenizer::piece(std::int32_t id) const {
  return id >= 0 && id < vocab_size() ? std::string_view(state_->spec.pieces[id])
                                      : std::string_view();
}

bool Tokenizer::is_special(std::int32_t id) const {
  return id >= 0 && id < vocab_size() && state_->special[id];
}

std::int32_t Tokenizer::vocab_size() const {
  return static_cast<std::int32_t>(state_->spec.pieces.size());
}
std::int32_t Tokenizer::bos_id() const { return state_->spec.bos_id; }
const std::vector<std::int32_t>& Tokenizer::eos_ids() const { return state_->eos_ids; }
const std::map<std::string, std::string>& Tokenizer::special_tokens() const {
  return state_->special_tokens;
}
const std::map<std::string, std::string>& Tokenizer::chat_templates() const {
  return state_->chat_templates;
}

}  // namespace infllm::engine
