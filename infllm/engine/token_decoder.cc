// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "infllm/engine/tokenizer.h"
#include "infllm/engine/tokenizer_state.h"
#include "infllm/engine/utf8.h"

namespace infllm::engine {
namespace {

using Leading = DecoderSpec::Leading;

Utf8Repair repair_of(const DecoderSpec& spec) {
  return spec.byte_level ? Utf8Repair::kMaximalSubpart : Utf8Repair::kPerByte;
}

}  // namespace

TokenDecoder::TokenDecoder(const Tokenizer& tokenizer, bool skip_special)
    : tokenizer_(tokenizer),
      skip_special_(skip_special),
      spaces_to_strip_(tokenizer.state_->spec.decoder.strip_spaces) {}

TokenDecoder::~TokenDecoder() = default;

std::string TokenDecoder::push(std::int32_t id) {
  const Tokenizer::State& state = *tokenizer_.state_;
  const DecoderSpec& decoder = state.spec.decoder;
  if (id < 0 || id >= tokenizer_.vocab_size()) return {};
  if (skip_special_ && state.special[id]) return {};
  std::string bytes = state.text[id];

  // The rules that look at whole tokens count markers in the piece, not spaces in the text.
  std::string_view piece = state.spec.pieces[id];
  if (piece.empty()) return {};
  const bool is_byte = decoder.byte_fallback && bytes.size() == 1 && piece.size() == 6;
  if (decoder.leading == Leading::kFirstTokenMarkers && first_token_ && !is_byte) {
    std::string kept;
    for (std::size_t at = 0; at < piece.size();) {
      const std::size_t count = utf8_at(piece, at).bytes;
      if (piece.substr(at, count) != kSpaceMarker) kept.append(piece, at, count);
      at += count;
    }
    bytes = std::move(kept);
  }
  if (decoder.leading == Leading::kSentencePiece ||
      decoder.leading == Leading::kSentencePieceExtra) {
    if (has_text_) marker_done_ = true;
    if (!marker_done_ && !is_byte && piece.starts_with(kSpaceMarker)) {
      bytes.erase(0, 1);
      marker_done_ = decoder.leading == Leading::kSentencePiece;
    }
  }
  first_token_ = false;
  has_text_ |= !bytes.empty();

  pending_ += bytes;
  std::string text = utf8_take(pending_, repair_of(decoder), /*final=*/false);
  strip_leading(text);
  return text;
}

std::string TokenDecoder::finish() {
  std::string text =
      utf8_take(pending_, repair_of(tokenizer_.state_->spec.decoder), /*final=*/true);
  strip_leading(text);
  first_token_ = true;
  has_text_ = marker_done_ = false;
  spaces_to_strip_ = tokenizer_.state_->spec.decoder.strip_spaces;
  return text;
}

// Spaces at the beginning of the whole text, for the rule that counts those.
void TokenDecoder::strip_leading(std::string& text) {
  std::size_t drop = 0;
  while (spaces_to_strip_ > 0 && drop < text.size()) {
    if (text[drop] != ' ') {
      spaces_to_strip_ = 0;
    } else {
      ++drop;
      --spaces_to_strip_;
    }
  }
  text.erase(0, drop);
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids, bool skip_special) const {
  TokenDecoder decoder(*this, skip_special);
  std::string text;
  for (const std::int32_t id : ids) text += decoder.push(id);
  return text += decoder.finish();
}

}  // namespace infllm::engine
