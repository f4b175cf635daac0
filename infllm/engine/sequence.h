// SPDX-License-Identifier: Apache-2.0
//
// The tokens of one conversation and what of them is in the cache.
//
// Dense or sparse (and short or long LongRoPE factors) is decided per sequence and step: by the
// whole prompt's length while it is prefilled, in however many chunks, and by the cache's length
// during decoding. The keys of the deeper layers depend on it. A new prompt therefore re-uses a
// cached prefix only as far as computing it afresh would have given the same keys.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "infllm/engine/kv_pool.h"
#include "infllm/ops/sparse_config.h"

namespace infllm::engine {

// How a token is computed.
struct Mode {
  bool sparse = false;
  bool long_rope = false;
  bool operator==(const Mode&) const = default;
};

// What decides the mode: the length that counts.
struct ModeRule {
  std::optional<SparseConfig> sparse;  // none: always dense
  std::int32_t rope_switch = 0;        // LongRoPE's long factors above this length; 0: one set

  Mode at(std::int64_t length) const {
    return {.sparse = sparse && sparse->is_sparse_at(length),
            .long_rope = rope_switch > 0 && length > rope_switch};
  }
};

struct Sequence {
  std::vector<std::int32_t> tokens;  // the prompt, then what was generated
  std::int32_t prompt_length = 0;
  std::int32_t cached = 0;          // leading tokens whose keys and values are in `pages`
  std::vector<std::int32_t> pages;  // page of each block
  Mode first_mode;                  // how the first token was computed,
  std::int32_t in_first_mode = 0;   // and how many leading ones like it

  std::int32_t length() const { return static_cast<std::int32_t>(tokens.size()); }
  std::int32_t uncached() const { return length() - cached; }
  // The length that decides how the next `count` tokens are computed.
  std::int32_t deciding_length(std::int32_t count) const {
    return cached < prompt_length ? prompt_length : cached + count;
  }

  // `count` more tokens are in the cache.
  void advance(std::int32_t count, Mode mode);
  // Forgets all but the first `count` tokens and gives their pages back.
  void truncate(std::int32_t count, KvPool& pool);
  // Starts on a new prompt, keeping the cached prefix that it shares.
  void restart(std::span<const std::int32_t> prompt, const ModeRule& rule, KvPool& pool);
  // The same with the cached prefix of another sequence, whose pages both have from then on.
  void fork(const Sequence& source, std::span<const std::int32_t> prompt, const ModeRule& rule,
            KvPool& pool);
};

// How many leading tokens of `prompt` restart() would keep. Never the last one: it is computed
// again, because its logits are wanted.
std::int32_t reusable_prefix(const Sequence& sequence, std::span<const std::int32_t> prompt,
                             const ModeRule& rule);
// The same as it will be when the sequence's own prompt has been computed.
std::int32_t coming_prefix(const Sequence& sequence, std::span<const std::int32_t> prompt,
                           const ModeRule& rule);

}  // namespace infllm::engine
