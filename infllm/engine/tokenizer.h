// SPDX-License-Identifier: Apache-2.0
//
// Text to token ids and back, as a checkpoint's own tokenizer does it.
//
//   Tokenizer tokenizer = INFLLM_TRY(Tokenizer::load("models/minicpm4"));
//   std::vector<std::int32_t> ids = tokenizer.encode("Hello", {});      // <s> first, if it asks so
//   std::string text = tokenizer.decode(ids);                          // "Hello"
//
//   TokenDecoder decoder(tokenizer);                                    // the same, one at a time
//   for (std::int32_t id : ids) std::cout << decoder.push(id);
//   std::cout << decoder.finish();
//
// Encoding equals that of the PyPI packages `tokenizers` (for tokenizer.json) and `sentencepiece`
// (for tokenizer.model). Text that is not UTF-8 is repaired first: one U+FFFD per offending byte.
//
// Decoding equals theirs, but for byte tokens that form no UTF-8: each stray byte becomes one
// U+FFFD and the characters around it stay, as SentencePiece does; `tokenizers` gives up the whole
// run of byte tokens, which no stream could know in time. Control tokens and the unknown token
// leave no text.
//
// Thread safety: a Tokenizer never changes after load; share it freely.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "infllm/core/status.h"
#include "infllm/engine/tokenizer_spec.h"

namespace infllm::engine {

struct EncodeOptions {
  bool add_bos = true;  // the ids that the checkpoint puts around a text; for most that is bos
  bool parse_special = true;  // "<s>" in the text is the token, not four characters
};

class Tokenizer {
 public:
  // From a checkpoint folder: tokenizer.json, or else tokenizer.model, with what the files of
  // tokenizer_config.h add to it.
  static Result<Tokenizer> load(const std::filesystem::path& folder);
  // From what a reader of tokenizer_files.h returned.
  static Result<Tokenizer> create(TokenizerSpec spec);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  std::vector<std::int32_t> encode(std::string_view text, EncodeOptions options) const;

  // Ids out of range leave no text.
  std::string decode(std::span<const std::int32_t> ids, bool skip_special = true) const;

  // The id of a token with exactly this text, added or not; -1 when there is none.
  std::int32_t id_of(std::string_view text) const;
  // The token as the file spells it; empty for an id out of range or unused.
  std::string_view piece(std::int32_t id) const;
  bool is_special(std::int32_t id) const;

  std::int32_t vocab_size() const;                   // largest id + 1
  std::int32_t bos_id() const;                       // -1 when there is none
  const std::vector<std::int32_t>& eos_ids() const;  // each of them ends an answer
  // bos_token, eos_token, unk_token and pad_token as far as known: the names templates use.
  const std::map<std::string, std::string>& special_tokens() const;
  // By name, "default" first of all; empty when the checkpoint has none.
  const std::map<std::string, std::string>& chat_templates() const;

 private:
  friend class TokenDecoder;
  struct State;
  explicit Tokenizer(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// A decode that takes tokens as they come. What push() and finish() return, put together, is
// decode() of all the tokens; no piece of it ends inside a UTF-8 sequence.
class TokenDecoder {
 public:
  // Keeps a reference to `tokenizer`.
  explicit TokenDecoder(const Tokenizer& tokenizer, bool skip_special = true);
  ~TokenDecoder();

  std::string push(std::int32_t id);
  std::string finish();  // what was held back; the decoder is then as new

 private:
  void strip_leading(std::string& text);

  const Tokenizer& tokenizer_;
  bool skip_special_;
  std::string pending_;       // bytes that may yet become a character
  bool first_token_ = true;   // of those that leave text
  bool has_text_ = false;     // some token before had text
  bool marker_done_ = false;  // the leading marker has been dropped, or can no longer be
  int spaces_to_strip_;
};

}  // namespace infllm::engine
