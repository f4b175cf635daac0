// SPDX-License-Identifier: Apache-2.0
//
// What a row of the fused step has to read, as one list of items that are shared out among all its
// warps: an item is 32 rows of the cache, which fill one stage of a warp's ring.
//
//   normalise  32 coarse windows
//   forced     16 tokens of a forced block, keys and values
//   score      32 fine windows, which are those of 8 blocks
//   free       16 tokens of a chosen block, keys and values
//
// The list is dealt out round by round over all warps, whatever the items are, so that nobody has
// two more than anybody else. Each warp walks through its items in order and fetches ahead over the
// borders between the kinds.
#pragma once

#include "infllm/backend/cuda/decode/kv_ring.cuh"
#include "infllm/backend/cuda/decode/row.cuh"

namespace infllm::cuda::decode {

inline constexpr int kItemRows = 32;
inline constexpr int kItemBlocks = kItemRows / kFineRows;  // of an item that scores
inline constexpr int kBlockItems = kPageTokens / kSliceTokens;

enum Kind : int { kNormalise, kForced, kScore, kFree };
inline constexpr int kKinds = 4;

// A warp's items, numbered 0, 1, ... in the order of the kinds.
struct WarpShare {
  // counts: items of the row in that order; `place` of this warp among `places`.
  __device__ __forceinline__ WarpShare(const int (&counts)[kKinds], int place, int places)
      : step(places) {
    const float inverse = 1.0f / static_cast<float>(places);
    int before = 0;
    int mine = 0;
#pragma unroll
    for (int k = 0; k < kKinds; ++k) {
      // place - before, modulo places
      int first = place - before + quotient(before + places - 1, inverse) * places;
      if (first >= places) first -= places;
      base[k] = first - mine * places;
      if (first < counts[k]) mine += quotient(counts[k] - 1 - first, inverse) + 1;
      ends[k] = mine;
      before += counts[k];
    }
  }

  // n / places, exact up to 2^20: half a place is more than the error of the product.
  __device__ __forceinline__ static int quotient(int n, float inverse) {
    return static_cast<int>((static_cast<float>(n) + 0.5f) * inverse);
  }

  // The end of the items of kinds up to `kind`.
  __device__ __forceinline__ int end_of(Kind kind) const {
    return kind == kNormalise ? +ends[0]
           : kind == kForced  ? +ends[1]
           : kind == kScore   ? +ends[2]
                              : +ends[3];
  }
  __device__ __forceinline__ Kind kind(int n) const {
    return n < ends[0] ? kNormalise : n < ends[1] ? kForced : n < ends[2] ? kScore : kFree;
  }
  // Its number among the row's items of that kind.
  __device__ __forceinline__ int index(int n) const {
    // Numbers, not places: a choice among places would put the arrays into memory.
    const int first = n < ends[0]   ? +base[0]
                      : n < ends[1] ? +base[1]
                      : n < ends[2] ? +base[2]
                                    : +base[3];
    return first + n * step;
  }

  int ends[kKinds];
  int base[kKinds];
  int step;
};

// Pooled keys of one sequence and KV head.
struct Windows {
  std::int64_t offset;  // of the plane in a page
  int page_shift;       // logarithm of a page's rows
  int end;              // windows that exist
};

}  // namespace infllm::cuda::decode
