// SPDX-License-Identifier: Apache-2.0
//
// Any bytes as text, through tokenizers of each family: encoding and decoding gives the text back,
// and decoding in a stream gives what decoding at once gives. The first byte chooses the tokenizer.
#include <fmt/format.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "infllm/core/status.h"
#include "infllm/engine/pre_tokenizer.h"
#include "infllm/engine/tokenizer.h"
#include "infllm/engine/tokenizer_spec.h"
#include "infllm/engine/utf8.h"

namespace {

using namespace infllm::engine;

// Byte pieces 0 to 255, then these; a merge for every piece of two characters or more.
constexpr const char* kPieces[] = {
    "a",  "b",   "ab", "aa", "aaaa", "ba",   "e", "\xC3\xA9",        "l", "ll", "t",
    "th", "the", "1",  "11", "\n",   "\n\n", ".", "\xF0\x9F\x98\x80"};

TokenizerSpec base_spec(bool byte_level) {
  TokenizerSpec spec;
  for (int byte = 0; byte < 256; ++byte) {
    std::string piece;
    if (byte_level) {
      utf8_append(piece, byte_level_character(static_cast<unsigned char>(byte)));
    } else {
      piece = fmt::format("<0x{:02X}>", byte);
    }
    spec.pieces.push_back(piece);
  }
  const auto add = [&](const std::string& piece) {
    for (std::size_t i = 0; i < spec.pieces.size(); ++i) {
      if (spec.pieces[i] == piece) return static_cast<std::int32_t>(i);
    }
    spec.pieces.push_back(piece);
    return static_cast<std::int32_t>(spec.pieces.size() - 1);
  };
  if (!byte_level) {
    const std::int32_t space = add(kSpaceMarker);
    spec.merges.push_back({space, space, add(std::string(kSpaceMarker) + kSpaceMarker), 0});
    for (const char* piece : kPieces) add(piece);
  }
  const auto merge = [&](const std::string& left, const std::string& right) {
    const std::int32_t a = add(left), b = add(right);
    spec.merges.push_back({a, b, add(left + right), static_cast<std::int32_t>(spec.merges.size())});
  };
  merge("a", "b");
  merge("a", "a");
  merge("b", "a");
  merge("t", "h");
  merge("th", "e");
  merge("l", "l");
  merge("aa", "aa");
  merge("1", "1");
  spec.types.assign(spec.pieces.size(), PieceType::kNormal);
  spec.pieces.push_back("<s>");
  spec.types.push_back(PieceType::kControl);
  spec.added_tokens.push_back(
      {.text = "<s>", .id = static_cast<std::int32_t>(spec.pieces.size() - 1), .special = true});
  return spec;
}

std::vector<Tokenizer> make_tokenizers() {
  std::vector<Tokenizer> out;
  TokenizerSpec llama = base_spec(false);
  llama.byte_fallback = true;
  llama.normalizer.steps = {
      {.kind = NormalizerStep::Kind::kPrepend, .text = kSpaceMarker},
      {.kind = NormalizerStep::Kind::kReplace, .text = " ", .replacement = kSpaceMarker}};
  llama.decoder = {.byte_fallback = true,
                   .marker_is_space = true,
                   .leading = DecoderSpec::Leading::kStripSpaces,
                   .strip_spaces = 1};
  out.push_back(Tokenizer::create(llama).value());

  TokenizerSpec model = base_spec(false);
  model.byte_fallback = true;
  model.normalizer = {.sentencepiece = true, .add_dummy_prefix = true, .escape_whitespaces = true};
  model.decoder = {.byte_fallback = true,
                   .marker_is_space = true,
                   .leading = DecoderSpec::Leading::kSentencePiece};
  for (int byte = 0; byte < 256; ++byte) model.types[byte] = PieceType::kByte;
  out.push_back(Tokenizer::create(model).value());

  for (const SplitPattern pattern :
       {SplitPattern::kLlama3, SplitPattern::kQwen2, SplitPattern::kGpt2}) {
    TokenizerSpec bytes = base_spec(true);
    bytes.pre_tokenizer = {.pattern = pattern, .byte_level = true};
    bytes.decoder = {.byte_level = true};
    out.push_back(Tokenizer::create(bytes).value());
  }
  return out;
}

std::string with_spaces(std::string text) {
  const std::string marker = kSpaceMarker;
  for (std::size_t at = 0; (at = text.find(marker, at)) != std::string::npos; ++at) {
    text.replace(at, marker.size(), " ");
  }
  return text;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::vector<Tokenizer> tokenizers = make_tokenizers();
  if (size == 0 || size > 4 * 1024) return 0;
  const std::size_t choice = data[0] % tokenizers.size();
  const Tokenizer& tokenizer = tokenizers[choice];
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);

  const auto plain = tokenizer.encode(text, {.add_bos = false, .parse_special = false});
  std::string want = utf8_repair(text, Utf8Repair::kPerByte);
  if (choice < 2) want = with_spaces(want);
  INFLLM_CHECK(tokenizer.decode(plain) == want, "encode and decode do not give the text back");

  // As ids, any bytes at all.
  std::vector<std::int32_t> ids = tokenizer.encode(text, {});
  for (const char c : text) ids.push_back(static_cast<unsigned char>(c) * 2 - 100);
  for (const bool skip : {false, true}) {
    TokenDecoder decoder(tokenizer, skip);
    std::string streamed;
    for (const std::int32_t id : ids) {
      const std::string piece = decoder.push(id);
      INFLLM_CHECK(utf8_valid(piece), "a piece of the stream is no UTF-8");
      streamed += piece;
    }
    streamed += decoder.finish();
    INFLLM_CHECK(streamed == tokenizer.decode(ids, skip), "stream and whole differ");
  }
  return 0;
}
