// SPDX-License-Identifier: Apache-2.0
//
// Readers of the two tokenizer formats. Both take bytes from outside: every length, id and type is
// checked, and what cannot be reproduced exactly is refused with kUnsupported.
//
// tokenizer.json (Hugging Face `tokenizers`): BPE models; normalizers Prepend, Replace, Strip and
// Sequence; pre-tokenizers Metaspace, ByteLevel, and Split with a known pattern followed by
// ByteLevel; their decoders; TemplateProcessing. Not: Unigram, WordPiece, NFC and its kin, other
// patterns.
//
// tokenizer.model (SentencePiece protobuf): BPE models, with byte fallback, user-defined and unused
// pieces and any character map. Not: unigram, char and word models, white space as a suffix.
#pragma once

#include <string_view>

#include "infllm/core/status.h"
#include "infllm/engine/tokenizer_spec.h"

namespace infllm::engine {

inline constexpr std::size_t kMaxTokenizerBytes = std::size_t{64} << 20;

Result<TokenizerSpec> read_tokenizer_json(std::string_view text);
Result<TokenizerSpec> read_tokenizer_model(std::string_view bytes);

}  // namespace infllm::engine
