// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/normalizer.h"

#include "infllm/engine/unicode_tables.h"
#include "infllm/engine/utf8.h"

namespace infllm::engine {
namespace {

constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  std::string out;
  std::size_t at = 0;
  for (std::size_t hit; (hit = text.find(from, at)) != std::string::npos; at = hit + from.size()) {
    out.append(text, at, hit - at).append(to);
  }
  if (at == 0) return;
  out.append(text, at);
  text = std::move(out);
}

std::size_t leading_space_bytes(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size()) {
    const Utf8Char c = utf8_at(text, at);
    if (!is_space(c.code)) break;
    at += c.bytes;
  }
  return at;
}

std::size_t bytes_without_trailing_space(std::string_view text) {
  std::size_t end = 0;
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Char c = utf8_at(text, at);
    at += c.bytes;
    if (!is_space(c.code)) end = at;
  }
  return end;
}

}  // namespace

Result<Normalizer> Normalizer::create(const TokenizerSpec& spec) {
  Normalizer normalizer(spec.normalizer);
  normalizer.charsmap_ = INFLLM_TRY(Charsmap::parse(spec.normalizer.charsmap));
  if (spec.normalizer.sentencepiece) {
    for (std::size_t id = 0; id < spec.pieces.size(); ++id) {
      if (spec.types[id] == PieceType::kUserDefined) {
        normalizer.user_defined_.insert(spec.pieces[id], static_cast<std::int32_t>(id));
      }
    }
  }
  return normalizer;
}

std::string Normalizer::apply(std::string_view segment, bool& at_start) const {
  return spec_->sentencepiece ? apply_sentencepiece(segment, at_start)
                              : apply_steps(segment, at_start);
}

std::string Normalizer::apply_steps(std::string_view segment, bool& at_start) const {
  std::string text(segment);
  for (const NormalizerStep& step : spec_->steps) {
    switch (step.kind) {
      case NormalizerStep::Kind::kPrepend:
        if (!text.empty()) text.insert(0, step.text);
        break;
      case NormalizerStep::Kind::kReplace:
        replace_all(text, step.text, step.replacement);
        break;
      case NormalizerStep::Kind::kStrip:
        if (step.right) text.resize(bytes_without_trailing_space(text));
        if (step.left) {
          const std::size_t dropped = leading_space_bytes(text);
          text.erase(0, dropped);
          at_start = at_start && dropped == 0;
        }
        break;
    }
  }
  return text;
}

// What stands for the text at `at`: a user-defined piece itself, else the longest replacement of
// the map, else the character. A stray byte becomes U+FFFD here, which the map does not see.
Normalizer::Unit Normalizer::next_unit(std::string_view text, std::size_t at) const {
  if (const ByteTrie::Match match = user_defined_.longest_prefix(text, at); match.value >= 0) {
    return {text.substr(at, match.bytes), match.bytes};
  }
  if (const Charsmap::Match match = charsmap_.longest(text, at); match.bytes > 0) {
    return {match.replacement, match.bytes};
  }
  const Utf8Char c = utf8_at(text, at);
  const auto bytes = static_cast<std::size_t>(c.bytes);
  return {c.valid ? text.substr(at, bytes) : kReplacementCharacter, bytes};
}

// In SentencePiece's order: leading spaces go, a space is put in front, runs of spaces become one,
// trailing spaces go; each only where the model asks for it.
std::string Normalizer::apply_sentencepiece(std::string_view segment, bool at_start) const {
  const std::string_view space = spec_->escape_whitespaces ? kSpaceMarker : " ";
  std::size_t at = 0;
  while (spec_->remove_extra_whitespaces && at < segment.size()) {
    const Unit unit = next_unit(segment, at);
    if (unit.text != " ") break;
    at += unit.consumed;
  }
  std::string out;
  if (at == segment.size()) return out;
  out.reserve(segment.size() + segment.size() / 2);
  if (spec_->add_dummy_prefix && (at_start || !spec_->dummy_prefix_first_only)) out += space;
  bool after_space = spec_->remove_extra_whitespaces;
  while (at < segment.size()) {
    Unit unit = next_unit(segment, at);
    at += unit.consumed;
    while (after_space && unit.text.starts_with(' ')) unit.text.remove_prefix(1);
    for (const char c : unit.text) {
      if (c == ' ') {
        out += space;
      } else {
        out += c;
      }
    }
    if (!unit.text.empty()) {
      after_space = spec_->remove_extra_whitespaces && unit.text.ends_with(' ');
    }
  }
  while (spec_->remove_extra_whitespaces && out.ends_with(space)) {
    out.resize(out.size() - space.size());
  }
  return out;
}

}  // namespace infllm::engine
