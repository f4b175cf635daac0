// SPDX-License-Identifier: Apache-2.0
//
// The inverse of a selection: which tokens chose a block, in ascending order, for every (sequence,
// KV head, block). Built by counting, summing up and filling, one task a (sequence, KV head), so
// that the lists do not depend on the number of threads.
//
//   const Choosers choosers = Choosers::of_selection(backend, params, arena);
//   const Choosers::List tokens = choosers.of(sequence, index, head, block);
//   for (std::int64_t i = 0; i < tokens.count; ++i) use(tokens[i]);  // on the packed axis
#pragma once

#include <cstdint>

#include "infllm/backend/cpu/page.h"
#include "infllm/core/arena.h"
#include "infllm/ops/attend.h"

namespace infllm::cpu {

class Choosers {
 public:
  struct List {
    const std::int32_t* tokens;  // null: consecutive ones
    std::int64_t first;          // of consecutive ones
    std::int64_t count;
    std::int64_t operator[](std::int64_t i) const {
      return tokens == nullptr ? first + i : tokens[i];
    }
  };

  // Without a selection, or in dense sequences, a block's choosers are all tokens from it on.
  static Choosers of_selection(const Backend& backend, const AttendParams& params, Arena& arena);
  // What of_selection takes from its arena.
  static void take(const AttendParams& params, ArenaSize& size);

  List of(const Sequence& sequence, std::int32_t index, std::int64_t head,
          std::int64_t block) const {
    if (!sequence.sparse || starts_ == nullptr) {
      const std::int64_t first =
          std::max<std::int64_t>(sequence.first_position(), block * kPageTokens);
      return {nullptr, sequence.first_token + first - sequence.first_position(),
              std::max<std::int64_t>(0, sequence.length - first)};
    }
    const std::int64_t* start = starts_ + (index * heads_kv_ + head) * (blocks_ + 1) + block;
    return {tokens_ + start[0], 0, start[1] - start[0]};
  }

 private:
  std::int64_t heads_kv_ = 0;
  std::int64_t blocks_ = 0;
  std::int64_t* starts_ = nullptr;  // [B, Hkv, blocks + 1] into tokens_
  std::int32_t* tokens_ = nullptr;  // [Hkv, T, columns]
};

}  // namespace infllm::cpu
