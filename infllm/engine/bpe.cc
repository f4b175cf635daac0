// SPDX-License-Identifier: Apache-2.0
#include "infllm/engine/bpe.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <queue>

#include "infllm/engine/utf8.h"

namespace infllm::engine {
namespace {

// Symbols below zero take part in no merge: ~id is a user-defined piece, and everything from
// kStranger down is a character that occurs in no piece.
constexpr std::int32_t kStranger = -0x40000000;

std::uint64_t mix(std::uint64_t x) {  // a finaliser with full avalanche (Stafford's variant 13)
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

bool is_single_character(std::string_view piece) {
  return !piece.empty() && utf8_at(piece, 0).bytes == static_cast<int>(piece.size());
}

}  // namespace

void derive_merges_from_scores(const std::vector<float>& scores, TokenizerSpec& spec) {
  std::vector<float> levels(scores);
  std::sort(levels.begin(), levels.end(), std::greater<>());
  levels.erase(std::unique(levels.begin(), levels.end()), levels.end());

  // What a symbol can be while SentencePiece merges: any character, or a piece that a merge yields.
  const auto is_result = [&](std::size_t id) {
    const PieceType type = spec.types[id];
    return type == PieceType::kNormal || type == PieceType::kUserDefined ||
           type == PieceType::kUnused;
  };
  std::unordered_map<std::string_view, std::int32_t> symbols;
  for (std::size_t id = 0; id < spec.pieces.size(); ++id) {
    if (is_result(id) || is_single_character(spec.pieces[id])) {
      symbols.emplace(spec.pieces[id], static_cast<std::int32_t>(id));
    }
  }
  auto next = static_cast<std::int32_t>(spec.pieces.size());
  for (std::size_t id = 0; id < spec.pieces.size(); ++id) {
    if (!is_result(id)) continue;
    const std::string_view piece = spec.pieces[id];
    for (std::size_t at = 0; at < piece.size();) {
      const std::size_t bytes = utf8_at(piece, at).bytes;
      if (symbols.emplace(piece.substr(at, bytes), next).second) {
        spec.extra_symbols.emplace_back(piece.substr(at, bytes));
        ++next;
      }
      at += bytes;
    }
  }

  for (std::size_t id = 0; id < spec.pieces.size(); ++id) {
    if (!is_result(id)) continue;
    const std::string_view piece = spec.pieces[id];
    const auto level = std::lower_bound(levels.begin(), levels.end(), scores[id], std::greater<>());
    const auto rank = static_cast<std::int32_t>(level - levels.begin());
    for (std::size_t cut = utf8_at(piece, 0).bytes; cut < piece.size();
         cut += utf8_at(piece, cut).bytes) {
      const auto left = symbols.find(piece.substr(0, cut));
      const auto right = symbols.find(piece.substr(cut));
      if (left == symbols.end() || right == symbols.end()) continue;
      spec.merges.push_back({left->second, right->second, static_cast<std::int32_t>(id), rank});
    }
  }
}

Bpe::Bpe(const TokenizerSpec& spec) : spec_(spec), scored_(spec.normalizer.sentencepiece) {
  for (std::size_t id = 0; id < spec.pieces.size(); ++id) {
    const std::string& piece = spec.pieces[id];
    if (piece.empty()) continue;
    vocabulary_.emplace(piece, static_cast<std::int32_t>(id));
    has_unused_ |= spec.types[id] == PieceType::kUnused;
    if (scored_ && spec.types[id] == PieceType::kUserDefined) {
      user_defined_.insert(piece, static_cast<std::int32_t>(id));
    }
  }
  // Tokens that the file adds to the model are found in the text only, never inside a word.
  if (!scored_) {
    for (const AddedToken& token : spec.added_tokens) {
      if (spec.types[token.id] != PieceType::kNormal) vocabulary_.erase(token.text);
    }
  }

  const auto add_character = [&](std::string_view text, std::int32_t symbol) {
    const char32_t code = utf8_at(text, 0).code;
    if (code >= characters_.size()) characters_.resize(code + 1, -1);
    characters_[code] = symbol;
  };
  for (const auto& [piece, id] : vocabulary_) {
    if (is_single_character(piece)) add_character(piece, id);
  }
  for (std::size_t i = 0; i < spec.extra_symbols.size(); ++i) {
    add_character(spec.extra_symbols[i], static_cast<std::int32_t>(spec.pieces.size() + i));
  }

  has_all_bytes_ = true;
  for (int byte = 0; byte < 256; ++byte) {
    bytes_[byte] = find(fmt::format("<0x{:02X}>", byte));
    has_all_bytes_ &= bytes_[byte] >= 0;
  }

  rules_.resize(std::bit_ceil(2 * spec.merges.size() + 1));
  for (const Merge& merge : spec.merges) {
    const std::uint64_t key = pair_key(merge.left, merge.right);
    std::size_t slot = mix(key) & (rules_.size() - 1);
    while (rules_[slot].pair != kNoPair && rules_[slot].pair != key) {
      slot = (slot + 1) & (rules_.size() - 1);
    }
    rules_[slot] = {key, merge.rank, merge.result};  // of two equal pairs the later rule counts
  }
}

std::int32_t Bpe::find(std::string_view piece) const {
  const auto found = vocabulary_.find(piece);
  return found == vocabulary_.end() ? -1 : found->second;
}

const Bpe::Rule* Bpe::rule(std::int32_t left, std::int32_t right) const {
  if (left < 0 || right < 0) return nullptr;
  const std::uint64_t key = pair_key(left, right);
  for (std::size_t slot = mix(key) & (rules_.size() - 1); rules_[slot].pair != kNoPair;
       slot = (slot + 1) & (rules_.size() - 1)) {
    if (rules_[slot].pair == key) return &rules_[slot];
  }
  return nullptr;
}

// tokenizer.json: a character that is no piece becomes its bytes, which take part in merges, or the
// unknown token, of which a run may fuse into one.
void Bpe::start_ranked(std::string_view word, std::vector<std::int32_t>& symbols) const {
  bool unknown = false;  // one is due; it is written when the next known character comes
  for (std::size_t at = 0; at < word.size();) {
    const Utf8Char c = utf8_at(word, at);
    const std::string_view bytes = word.substr(at, c.bytes);
    at += c.bytes;
    if (const std::int32_t id = symbol_of(c.code); id >= 0) {
      if (unknown) symbols.push_back(spec_.unk_id);
      unknown = false;
      symbols.push_back(id);
      continue;
    }
    if (spec_.byte_fallback && std::all_of(bytes.begin(), bytes.end(), [&](char b) {
          return bytes_[static_cast<unsigned char>(b)] >= 0;
        })) {
      for (const char b : bytes) symbols.push_back(bytes_[static_cast<unsigned char>(b)]);
      continue;
    }
    if (spec_.unk_id < 0) continue;  // nothing stands for it
    if (unknown && !spec_.fuse_unk) symbols.push_back(spec_.unk_id);
    unknown = true;
  }
  if (unknown) symbols.push_back(spec_.unk_id);
}

// SentencePiece: user-defined pieces stand apart, every other character is a symbol, known or not.
void Bpe::start_scored(std::string_view word, std::vector<std::int32_t>& symbols) const {
  for (std::size_t at = 0; at < word.size();) {
    if (const ByteTrie::Match match = user_defined_.longest_prefix(word, at); match.value >= 0) {
      symbols.push_back(~match.value);
      at += match.bytes;
      continue;
    }
    const Utf8Char c = utf8_at(word, at);
    const std::int32_t symbol = symbol_of(c.code);
    symbols.push_back(symbol >= 0 ? symbol : kStranger - static_cast<std::int32_t>(c.code));
    at += c.bytes;
  }
}

// Merges in place. Returns, for each unused piece that came up, the pair it was last made of.
Bpe::UnusedPairs Bpe::merge(std::vector<std::int32_t>& symbols) const {
  struct Node {
    std::int32_t previous, next;
  };
  struct Candidate {
    std::int32_t rank, at, result;
    bool operator<(const Candidate& other) const {  // std::priority_queue puts the largest first
      return rank != other.rank ? rank > other.rank : at > other.at;
    }
  };
  constexpr std::int32_t kGone = INT32_MIN;
  UnusedPairs unused;
  const auto count = static_cast<std::int32_t>(symbols.size());
  std::vector<Node> nodes(symbols.size());
  std::vector<Candidate> found;
  const auto consider = [&](std::int32_t at, std::int32_t next, auto&& take) {
    const Rule* merge = rule(symbols[at], symbols[next]);
    if (merge == nullptr) return;
    if (has_unused_ && spec_.types[merge->result] == PieceType::kUnused) {
      unused[merge->result] = merge->pair;
    }
    take(Candidate{merge->rank, at, merge->result});
  };
  for (std::int32_t i = 0; i < count; ++i) {
    nodes[i] = {i - 1, i + 1 < count ? i + 1 : -1};
    if (i + 1 < count) consider(i, i + 1, [&](Candidate c) { found.push_back(c); });
  }
  std::priority_queue<Candidate> queue(std::less<Candidate>(), std::move(found));
  const auto push = [&](Candidate c) { queue.push(c); };
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    if (symbols[top.at] == kGone) continue;
    const std::int32_t next = nodes[top.at].next;
    if (next < 0) continue;
    const Rule* merge = rule(symbols[top.at], symbols[next]);
    if (merge == nullptr || merge->result != top.result) continue;  // the pair has changed since
    symbols[top.at] = top.result;
    symbols[next] = kGone;
    nodes[top.at].next = nodes[next].next;
    if (nodes[next].next >= 0) nodes[nodes[next].next].previous = top.at;
    if (nodes[top.at].previous >= 0) consider(nodes[top.at].previous, top.at, push);
    if (nodes[top.at].next >= 0) consider(top.at, nodes[top.at].next, push);
  }
  std::erase(symbols, kGone);
  return unused;
}

// SentencePiece: an unused piece falls back into the pair it came from; a character that is no
// piece becomes its bytes, or the unknown token, of which a run is one.
void Bpe::finish_scored(std::int32_t symbol, const UnusedPairs& unused,
                        std::vector<std::int32_t>& ids, bool& after_unknown) const {
  const auto pieces = static_cast<std::int32_t>(spec_.pieces.size());
  if (symbol < 0 && symbol > kStranger) symbol = ~symbol;
  if (symbol >= 0 && symbol < pieces) {
    const auto pair = unused.find(symbol);
    if (pair != unused.end()) {
      finish_scored(static_cast<std::int32_t>(pair->second >> 32), unused, ids, after_unknown);
      finish_scored(static_cast<std::int32_t>(pair->second & 0xFFFFFFFF), unused, ids,
                    after_unknown);
      return;
    }
    if (spec_.types[symbol] != PieceType::kUnknown) {
      ids.push_back(symbol);
      after_unknown = false;
      return;
    }
  }
  std::string text;
  if (symbol <= kStranger) {
    utf8_append(text, static_cast<char32_t>(kStranger - symbol));
  } else {
    text = symbol < pieces ? spec_.pieces[symbol] : spec_.extra_symbols[symbol - pieces];
  }
  if (spec_.byte_fallback && has_all_bytes_) {
    for (const char b : text) ids.push_back(bytes_[static_cast<unsigned char>(b)]);
  } else if (!after_unknown && spec_.unk_id >= 0) {
    ids.push_back(spec_.unk_id);
  }
  after_unknown = true;
}

void Bpe::encode(std::string_view word, std::vector<std::int32_t>& ids) const {
  if (word.empty()) return;
  std::vector<std::int32_t> symbols;
  symbols.reserve(word.size());
  if (scored_) {
    start_scored(word, symbols);
    const UnusedPairs unused = merge(symbols);
    bool after_unknown = false;
    for (const std::int32_t symbol : symbols) finish_scored(symbol, unused, ids, after_unknown);
    return;
  }
  if (spec_.ignore_merges) {
    if (const std::int32_t id = find(word); id >= 0) {
      ids.push_back(id);
      return;
    }
  }
  start_ranked(word, symbols);
  merge(symbols);
  ids.insert(ids.end(), symbols.begin(), symbols.end());
}

}  // namespace infllm::engine
