// SPDX-License-Identifier: Apache-2.0
//
// What a tokenizer file says, as plain data. The readers (tokenizer_files.h) fill it, Tokenizer
// runs it. Text flows through the fields in this order:
//
//   text -> added tokens cut out -> normalizer -> added tokens (normalized ones) cut out
//        -> pre_tokenizer -> words -> BPE merges -> ids
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace infllm::engine {

inline constexpr std::int32_t kMaxVocabulary = 1'000'000;
inline constexpr std::size_t kMaxPieceBytes = 4096;
inline constexpr char kSpaceMarker[] = "\xE2\x96\x81";  // U+2581, SentencePiece's visible space

// A token that is found in the text before anything else happens to it.
struct AddedToken {
  std::string text;
  std::int32_t id = -1;
  bool special = false;      // a control token: matched only when asked for, skipped in output
  bool single_word = false;  // matches only between characters that are no word characters
  bool lstrip = false;       // swallows white space before it
  bool rstrip = false;       // swallows white space after it
  bool normalized = false;   // is looked for in the normalized text
};

enum class PieceType : std::uint8_t { kNormal, kUnknown, kControl, kUserDefined, kUnused, kByte };

struct NormalizerStep {
  enum class Kind { kPrepend, kReplace, kStrip };
  Kind kind = Kind::kPrepend;
  std::string text;         // what to prepend, or to look for
  std::string replacement;  // kReplace
  bool left = false;        // kStrip
  bool right = false;
};

struct NormalizerSpec {
  std::vector<NormalizerStep> steps;  // tokenizer.json
  bool sentencepiece = false;         // tokenizer.model: the fields below, in SentencePiece's order
  std::string charsmap;               // precompiled character map; empty is the identity
  bool add_dummy_prefix = false;
  bool dummy_prefix_first_only = false;  // only where the text itself begins, not after a token
  bool remove_extra_whitespaces = false;
  bool escape_whitespaces = false;
};

enum class PrependScheme { kNever, kFirst, kAlways };
enum class SplitPattern { kNone, kGpt2, kLlama3, kQwen2 };

struct PreTokenizerSpec {
  bool metaspace =
      false;  // space -> marker, then a word begins at each marker (if metaspace_split)
  PrependScheme prepend = PrependScheme::kNever;
  bool metaspace_split = true;
  SplitPattern pattern = SplitPattern::kNone;
  bool byte_level = false;        // every byte becomes one printable character
  bool add_prefix_space = false;  // of ByteLevel
};

struct DecoderSpec {
  enum class Leading {
    kKeep,
    kStripSpaces,         // up to strip_spaces spaces of the whole text
    kFirstTokenMarkers,   // every marker of the first token (Metaspace)
    kSentencePiece,       // one marker of the first piece with text
    kSentencePieceExtra,  // one marker of each piece until there is text
  };
  bool byte_level = false;
  bool byte_fallback = false;
  bool marker_is_space = false;
  Leading leading = Leading::kKeep;
  int strip_spaces = 0;
};

struct Merge {
  std::int32_t left, right;  // symbols; an id, or beyond the pieces a character that is no piece
  std::int32_t result;
  std::int32_t rank;  // lower first; among equals the leftmost
};

struct TokenizerSpec {
  std::vector<std::string> pieces;  // by id; an empty piece is a hole in the numbering
  std::vector<PieceType> types;     // same length
  std::vector<Merge> merges;
  std::vector<std::string> extra_symbols;  // characters that only occur inside pieces
  std::int32_t unk_id = -1;
  bool fuse_unk = false;
  bool byte_fallback = false;
  bool ignore_merges = false;  // a word that is a piece is that piece
  NormalizerSpec normalizer;
  PreTokenizerSpec pre_tokenizer;
  DecoderSpec decoder;
  std::vector<AddedToken> added_tokens;
  std::vector<std::int32_t> prefix_ids, suffix_ids;  // what the file adds around every text
  std::int32_t bos_id = -1;
  std::int32_t eos_id = -1;
};

}  // namespace infllm::engine
