// SPDX-License-Identifier: Apache-2.0
//
// Which entries of a tile's list (union.h) a warpgroup, its warps and its rows want.
#pragma once

#include "infllm/backend/cuda/sm90/attend_rows.cuh"

namespace infllm::cuda::sm90 {

// Who wants the next 32 blocks of the list.
template <class C>
class Wishes {
 public:
  __device__ __forceinline__ Wishes(const AttendArgs& a, const Rows<C>& rows, int count,
                                    int singles)
      : args_(a), rows_(rows), entries_(rows.in_use() ? count : 0), singles_(singles) {
    fetch(0);
  }

  // Entry `base` + i is described by bit i of each word. To be called with 0, 32, 64 ...; reads
  // ahead, because a warpgroup that waits for memory here makes the others wait.
  __device__ __forceinline__ void load(int base) {
    constexpr unsigned kAll = 0xffffffff;
    group = __ballot_sync(kAll, (next_set_ & rows_.group_set()) != 0);
    own = __ballot_sync(kAll, next_block_ == rows_.own_block());
    if constexpr (C::kGroup == 16) {
      row[0] = __ballot_sync(kAll, next_set_ >> rows_.warp_token() & 1);
      row[1] = row[0];
    } else {
      for (int i = 0; i < max(1, 16 >> rows_.group_log2); ++i) {
        const int token = rows_.warp_token() + i;
        const unsigned word = __ballot_sync(kAll, next_set_ >> token & 1);
        if (rows_.token(0) == token) row[0] = word;
        if (rows_.token(1) == token) row[1] = word;
      }
    }
    fetch(base + 32);
  }

  unsigned group = 0;        // some token of this warpgroup
  unsigned row[2] = {0, 0};  // the tokens of this lane's rows
  unsigned own = 0;          // it is the tokens' own block

 private:
  __device__ __forceinline__ void fetch(int base) {
    const int entry = base + static_cast<int>(threadIdx.x % 32);
    next_set_ = 0;
    next_block_ = -1;
    if (entry < entries_) {
      const std::int64_t at = args_.lists.place(rows_.tile.index - args_.first, entry, singles_);
      next_set_ = static_cast<const typename C::TokenSet*>(args_.lists.tokens)[at];
      next_block_ = args_.lists.blocks[at];
    }
  }

  const AttendArgs& args_;
  const Rows<C>& rows_;
  int entries_;
  int singles_;
  typename C::TokenSet next_set_;
  int next_block_;
};

}  // namespace infllm::cuda::sm90
