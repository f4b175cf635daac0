// SPDX-License-Identifier: Apache-2.0
//
// SentencePiece's ModelProto, read field by field from the protobuf wire format.
#include <fmt/format.h>

#include <bit>
#include <cmath>
#include <unordered_set>

#include "infllm/engine/bpe.h"
#include "infllm/engine/tokenizer_files.h"
#include "infllm/engine/utf8.h"

namespace infllm::engine {
namespace {

// Cutting a piece everywhere costs the square of its length; SentencePiece's own default limit
// is 16.
constexpr std::size_t kMaxModelPieceBytes = 256;

// One field: its number and, by wire type, an integer or bytes.
struct Field {
  std::uint32_t number = 0;
  int wire = 0;
  std::uint64_t integer = 0;  // wire 0, 1, 5
  std::string_view bytes;     // wire 2
};

class WireReader {
 public:
  explicit WireReader(std::string_view bytes) : bytes_(bytes) {}

  bool done() const { return at_ == bytes_.size(); }

  Result<Field> next() {
    Field field;
    const std::uint64_t tag = INFLLM_TRY(varint());
    field.number = static_cast<std::uint32_t>(tag >> 3);
    field.wire = static_cast<int>(tag & 7);
    if (field.number == 0 || (tag >> 3) > 0x1FFFFFFF) return broken("a field number out of range");
    switch (field.wire) {
      case 0:
        field.integer = INFLLM_TRY(varint());
        return field;
      case 1:
        field.integer = INFLLM_TRY(fixed(8));
        return field;
      case 2: {
        const std::uint64_t length = INFLLM_TRY(varint());
        if (length > bytes_.size() - at_) return broken("a length beyond the end");
        field.bytes = bytes_.substr(at_, length);
        at_ += length;
        return field;
      }
      case 5:
        field.integer = INFLLM_TRY(fixed(4));
        return field;
      default:
        return broken(fmt::format("wire type {}", field.wire));
    }
  }

 private:
  Status broken(const std::string& what) const {
    return data_error(fmt::format(
        "tokenizer.model: not a SentencePiece model: {} at byte {} of a message of {} bytes", what,
        at_, bytes_.size()));
  }
  Result<std::uint64_t> varint() {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (done()) return broken("a number is cut short");
      const auto byte = static_cast<unsigned char>(bytes_[at_++]);
      value |= std::uint64_t{byte & 0x7Fu} << shift;
      if (byte < 0x80) return value;
    }
    return broken("a number of more than 10 bytes");
  }
  Result<std::uint64_t> fixed(std::size_t bytes) {
    if (bytes > bytes_.size() - at_) return broken("a number is cut short");
    std::uint64_t value = 0;
    for (std::size_t i = bytes; i-- > 0;) {
      value = (value << 8) | static_cast<unsigned char>(bytes_[at_ + i]);
    }
    at_ += bytes;
    return value;
  }

  std::string_view bytes_;
  std::size_t at_ = 0;
};

struct Model {  // ModelProto, as far as it matters here, with the defaults of its schema
  std::vector<std::string> pieces;
  std::vector<float> scores;
  std::vector<PieceType> types;
  std::int64_t model_type = 1;
  bool byte_fallback = false;
  bool suffix_space = false;
  std::int64_t bos_id = 1, eos_id = 2;
  std::string_view charsmap;
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = true;
  bool escape_whitespaces = true;
  bool denormalizes = false;
};

// A field of our interest with another wire type than the schema's is another field to protobuf: it
// is skipped.
constexpr int kVarint = 0, kBytes = 2, kFixed32 = 5;

Status read_piece(std::string_view bytes, Model& model) {
  const std::size_t id = model.pieces.size();
  std::string_view text;
  float score = 0;
  PieceType type = PieceType::kNormal;
  for (WireReader reader(bytes); !reader.done();) {
    const Field field = INFLLM_TRY(reader.next());
    if (field.number == 1 && field.wire == kBytes) text = field.bytes;
    if (field.number == 2 && field.wire == kFixed32) {
      score = std::bit_cast<float>(static_cast<std::uint32_t>(field.integer));
    }
    if (field.number == 3 && field.wire == kVarint) {
      switch (field.integer) {
        case 1:
          type = PieceType::kNormal;
          break;
        case 2:
          type = PieceType::kUnknown;
          break;
        case 3:
          type = PieceType::kControl;
          break;
        case 4:
          type = PieceType::kUserDefined;
          break;
        case 5:
          type = PieceType::kUnused;
          break;
        case 6:
          type = PieceType::kByte;
          break;
        default:
          return data_error(fmt::format("tokenizer.model: piece {} has type {}, expected 1 to 6",
                                        id, field.integer));
      }
    }
  }
  if (text.empty() || text.size() > kMaxModelPieceBytes || !utf8_valid(text)) {
    return data_error(
        fmt::format("tokenizer.model: piece {} is {} bytes of {}, expected 1 to {} bytes of UTF-8",
                    id, text.size(), utf8_valid(text) ? "UTF-8" : "no UTF-8", kMaxModelPieceBytes));
  }
  if (!std::isfinite(score)) {
    return data_error(fmt::format("tokenizer.model: the score of piece {} is not finite", id));
  }
  if (id >= static_cast<std::size_t>(kMaxVocabulary)) {
    return data_error(fmt::format("tokenizer.model: more than {} pieces", kMaxVocabulary));
  }
  model.pieces.emplace_back(text);
  model.scores.push_back(score);
  model.types.push_back(type);
  return {};
}

Status read_trainer(std::string_view bytes, Model& model) {
  for (WireReader reader(bytes); !reader.done();) {
    const Field field = INFLLM_TRY(reader.next());
    if (field.wire != kVarint) continue;
    const auto number = static_cast<std::int64_t>(field.integer);
    if (field.number == 3) model.model_type = number;
    if (field.number == 24) model.suffix_space = number != 0;
    if (field.number == 35) model.byte_fallback = number != 0;
    if (field.number == 41) model.bos_id = number;
    if (field.number == 42) model.eos_id = number;
  }
  return {};
}

Status read_normalizer(std::string_view bytes, Model& model) {
  for (WireReader reader(bytes); !reader.done();) {
    const Field field = INFLLM_TRY(reader.next());
    if (field.number == 2 && field.wire == kBytes) model.charsmap = field.bytes;
    if (field.wire != kVarint) continue;
    if (field.number == 3) model.add_dummy_prefix = field.integer != 0;
    if (field.number == 4) model.remove_extra_whitespaces = field.integer != 0;
    if (field.number == 5) model.escape_whitespaces = field.integer != 0;
  }
  return {};
}

Result<Model> read_model(std::string_view bytes) {
  Model model;
  for (WireReader reader(bytes); !reader.done();) {
    const Field field = INFLLM_TRY(reader.next());
    if (field.wire != kBytes) continue;
    if (field.number == 1) INFLLM_TRY(read_piece(field.bytes, model));
    if (field.number == 2) INFLLM_TRY(read_trainer(field.bytes, model));
    if (field.number == 3) INFLLM_TRY(read_normalizer(field.bytes, model));
    if (field.number == 5) {
      Model denormalizer;
      INFLLM_TRY(read_normalizer(field.bytes, denormalizer));
      model.denormalizes = !denormalizer.charsmap.empty();
    }
  }
  return model;
}

Status check(const Model& model) {
  if (model.pieces.empty()) return data_error("tokenizer.model: no pieces");
  if (model.model_type != 2) {
    return unsupported(fmt::format(
        "tokenizer.model: model type {}, expected 2 (BPE); unigram, word and char models are not "
        "supported",
        model.model_type));
  }
  if (model.suffix_space) {
    return unsupported("tokenizer.model: treat_whitespace_as_suffix is not supported");
  }
  if (model.denormalizes) {
    return unsupported("tokenizer.model: a denormalizer with a character map is not supported");
  }
  std::unordered_set<std::string_view> seen;
  std::int64_t unknown = 0, bytes = 0;
  for (std::size_t id = 0; id < model.pieces.size(); ++id) {
    if (!seen.insert(model.pieces[id]).second) {
      return data_error(
          fmt::format("tokenizer.model: piece {} \"{}\" appears twice", id, model.pieces[id]));
    }
    unknown += model.types[id] == PieceType::kUnknown;
    bytes += model.types[id] == PieceType::kByte;
  }
  if (unknown != 1) {
    return data_error(
        fmt::format("tokenizer.model: {} unknown pieces, expected exactly 1", unknown));
  }
  if (bytes != 0 && !model.byte_fallback) {
    return data_error(fmt::format("tokenizer.model: {} byte pieces without byte_fallback", bytes));
  }
  for (int byte = 0; model.byte_fallback && byte < 256; ++byte) {
    const std::string name = fmt::format("<0x{:02X}>", byte);
    if (bytes != 256 || !seen.contains(name)) {
      return data_error(fmt::format(
          "tokenizer.model: byte_fallback with {} byte pieces, expected <0x00> to <0xFF>", bytes));
    }
  }
  return {};
}

// bos and eos of the trainer count where the vocabulary has such a piece.
std::int32_t control_id(const Model& model, std::int64_t id) {
  const bool present = id >= 0 && id < static_cast<std::int64_t>(model.pieces.size()) &&
                       model.types[id] == PieceType::kControl;
  return present ? static_cast<std::int32_t>(id) : -1;
}

}  // namespace

Result<TokenizerSpec> read_tokenizer_model(std::string_view bytes) {
  if (bytes.size() > kMaxTokenizerBytes) {
    return data_error(fmt::format("tokenizer.model: {} bytes, expected at most {}", bytes.size(),
                                  kMaxTokenizerBytes));
  }
  Model model = INFLLM_TRY(read_model(bytes));
  INFLLM_TRY(check(model));

  TokenizerSpec spec;
  spec.byte_fallback = model.byte_fallback;
  spec.normalizer.sentencepiece = true;
  spec.normalizer.charsmap = std::string(model.charsmap);
  spec.normalizer.add_dummy_prefix = model.add_dummy_prefix;
  spec.normalizer.remove_extra_whitespaces = model.remove_extra_whitespaces;
  spec.normalizer.escape_whitespaces = model.escape_whitespaces;
  spec.decoder.byte_fallback = model.byte_fallback;
  spec.decoder.marker_is_space = true;
  using Leading = DecoderSpec::Leading;
  spec.decoder.leading = model.remove_extra_whitespaces ? Leading::kSentencePieceExtra
                         : model.add_dummy_prefix       ? Leading::kSentencePiece
                                                        : Leading::kKeep;
  spec.bos_id = control_id(model, model.bos_id);
  spec.eos_id = control_id(model, model.eos_id);
  if (spec.bos_id >= 0) spec.prefix_ids = {spec.bos_id};  // the Llama convention; config overrides
  for (std::size_t id = 0; id < model.pieces.size(); ++id) {
    const bool unknown = model.types[id] == PieceType::kUnknown;
    if (unknown) spec.unk_id = static_cast<std::int32_t>(id);
    if (unknown || model.types[id] == PieceType::kControl) {
      spec.added_tokens.push_back(
          {.text = model.pieces[id], .id = static_cast<std::int32_t>(id), .special = true});
    }
  }
  spec.pieces = std::move(model.pieces);
  spec.types = std::move(model.types);
  derive_merges_from_scores(model.scores, spec);
  return spec;
}

}  // namespace infllm::engine
