// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/charsmap.h"

#include <fmt/format.h>

#include "infllm/engine/utf8.h"

namespace infllm::engine {
namespace {

std::uint32_t little_endian(std::string_view bytes, std::size_t at) {
  std::uint32_t value = 0;
  for (int i = 3; i >= 0; --i) value = (value << 8) | static_cast<unsigned char>(bytes[at + i]);
  return value;
}

std::uint32_t offset_of(std::uint32_t unit) { return (unit >> 10) << ((unit & (1u << 9)) >> 6); }
std::uint32_t label_of(std::uint32_t unit) { return unit & ((1u << 31) | 0xFFu); }
bool has_leaf(std::uint32_t unit) { return ((unit >> 8) & 1u) != 0; }
std::uint32_t value_of(std::uint32_t unit) { return unit & ~(1u << 31); }

}  // namespace

Result<Charsmap> Charsmap::parse(std::string_view blob) {
  Charsmap map;
  if (blob.empty()) return map;
  if (blob.size() < 4) {
    return data_error(fmt::format("precompiled_charsmap of {} bytes has no header", blob.size()));
  }
  const std::size_t trie_bytes = little_endian(blob, 0);
  if (trie_bytes % 4 != 0 || trie_bytes == 0 || trie_bytes >= blob.size() - 4) {
    return data_error(
        fmt::format("precompiled_charsmap says {} bytes of trie, expected a multiple of 4 below {}",
                    trie_bytes, blob.size() - 4));
  }
  map.units_.reserve(trie_bytes / 4);
  for (std::size_t at = 4; at < 4 + trie_bytes; at += 4) {
    map.units_.push_back(little_endian(blob, at));
  }
  map.replacements_ = std::string(blob.substr(4 + trie_bytes));
  if (map.replacements_.back() != '\0' || !utf8_valid(map.replacements_)) {
    return data_error("precompiled_charsmap: the replacements are not zero-terminated UTF-8");
  }
  return map;
}

Charsmap::Match Charsmap::longest(std::string_view text, std::size_t at) const {
  Match best;
  if (units_.empty()) return best;
  std::size_t node = offset_of(units_[0]);
  for (std::size_t i = at; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    node ^= byte;
    // A map from outside may point anywhere: leaving the array means that nothing matches.
    if (node >= units_.size() || label_of(units_[node]) != byte) break;
    const std::uint32_t unit = units_[node];
    node ^= offset_of(unit);
    if (!has_leaf(unit)) continue;
    if (node >= units_.size()) break;
    const std::size_t value = value_of(units_[node]);
    if (value >= replacements_.size()) break;
    best.bytes = i + 1 - at;
    best.replacement = std::string_view(replacements_.data() + value);
  }
  return best;
}

}  // namespace infllm::engine
