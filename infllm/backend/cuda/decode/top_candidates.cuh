// SPDX-License-Identifier: Apache-2.0
//
// The best blocks of a row, by every one of its parts, from keys that arrive in words of global
// memory (exchange.cuh).
//
// 1. A thread takes up to eight neighbouring blocks, several times where there are many, and keeps
//    the best key. They go to a warp by their number modulo the warps, so that each warp sees a
//    sample of the whole row.
// 2. Of a warp's 32 best the m-th is at most the K-th best of all, if m warps are at least K: the
//    least of these over the warps is a bound that few more than K keys reach.
// 3. Those are put together and each is compared with all of them; how many are better is its
//    place in the list.
//
// Keys are compared together with block numbers, lower ones first, so none equals another, and the
// list does not depend on the order in which threads run.
#pragma once

#include "infllm/backend/cuda/decode/exchange.cuh"
#include "infllm/backend/cuda/decode/top_blocks.cuh"

namespace infllm::cuda::decode {

inline constexpr int kMostTogether = 8;  // blocks of a thread that follow each other

template <int kThreads>
struct TopCandidatesShared {
  static constexpr int kMaxFound = 4 * kThreads;

  // By all threads, with a barrier of them before choose().
  __device__ __forceinline__ void clear() {
    reinterpret_cast<uint4*>(found)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    count = 0;
  }

  alignas(16) std::uint16_t keys[kMaxCandidates];
  alignas(16) std::uint32_t found[kMaxFound];
  alignas(16) std::uint32_t best[kThreads];
  alignas(16) std::uint32_t bounds[kThreads / 32];
  std::int32_t count;  // of those found
  TopBlocksShared<kThreads> radix;
};

template <int kThreads>
class TopCandidates {
 public:
  using Shared = TopCandidatesShared<kThreads>;
  static constexpr int kMaxNeed = kThreads;  // as many bests are looked at

  // keys: of blocks 0 .. end - 1, packed() as they were found, to be chosen among those from
  // `first` on.
  __device__ __forceinline__ TopCandidates(const std::uint32_t* keys, int first, int end,
                                           Shared& shared)
      : keys_(keys),
        first_(first),
        end_(end),
        together_(end <= kThreads       ? 1
                  : end <= 2 * kThreads ? 2
                  : end <= 4 * kThreads ? 4
                                        : kMostTogether),
        rounds_((end + kThreads * together_ - 1) / (kThreads * together_)),
        shared_(shared),
        warp_(static_cast<int>(threadIdx.x / 32)),
        lane_(static_cast<int>(threadIdx.x % 32)) {}

  // Leaves the best `need` <= kMaxNeed blocks in `out`, in some order that is always the same; by
  // all threads, with a barrier at the end.
  __device__ __forceinline__ void choose(int need, std::int32_t* out) {
    shared_.best[threadIdx.x] = take_all();
    __syncwarp();
    find_bound((need + kWarps - 1) / kWarps);
    __syncthreads();
    collect();
    __syncthreads();
    const int count = shared_.count;
    if (count > Shared::kMaxFound) {
      choose_by_digits(need, out);
    } else {
      rank(count, need, out);
    }
    __syncthreads();
  }

 private:
  static constexpr int kWarps = kThreads / 32;

  // This thread's first block of a round.
  __device__ __forceinline__ int first_block(int round) const {
    return together_ * (kThreads * round + kWarps * lane_ + warp_);
  }
  __device__ __forceinline__ bool is_candidate(int block) const {
    return block >= first_ && block < end_;
  }
  // Unlike any other block's, and not 0.
  __device__ __forceinline__ static std::uint32_t unique(std::uint32_t key, int block) {
    return key << 16 | (0xffff - static_cast<std::uint32_t>(block));
  }
  __device__ __forceinline__ uint4& here(int round) const {
    return reinterpret_cast<uint4*>(shared_.keys)[kThreads * round + static_cast<int>(threadIdx.x)];
  }

  // Waits for this thread's blocks, leaves their keys in shared memory, returns the best.
  __device__ __forceinline__ std::uint32_t take_all() {
    std::uint32_t best = 0;
#pragma unroll 1
    for (int round = 0; round < rounds_; ++round) {
      const int first = first_block(round);
      const int count = first < end_ ? together_ : 0;
      // One before the first: the last window of a block overlaps the next one.
      std::uint32_t words[1 + kMostTogether];
      words[0] = 0;
      if (together_ == kMostTogether) {
        uint4 pieces[2];
        do {
          look_at(keys_ + first, 4, count / 4, pieces);
          if (first > 0 && count > 0) look(keys_ + first - 1, words[0]);
        } while (__any_sync(kAllLanes, !are_there(count / 4, pieces) || !is_there(words[0])));
#pragma unroll
        for (int c = 0; c < kMostTogether; ++c) words[1 + c] = word(pieces[c / 4], c % 4);
      } else {
        bool all_there;
        do {
          all_there = true;
#pragma unroll
          for (int c = 0; c <= kMostTogether / 2; ++c) {
            if (c <= count && count > 0 && first - 1 + c >= 0) {
              look(keys_ + first - 1 + c, words[c]);
              all_there &= is_there(words[c]);
            }
          }
        } while (__any_sync(kAllLanes, !all_there));
      }
      std::uint32_t key[kMostTogether];
#pragma unroll
      for (int c = 0; c < kMostTogether; ++c) {
        key[c] = max(words[1 + c] >> 16, words[c] & 0xffff);
        if (c < count && is_candidate(first + c)) best = max(best, unique(key[c], first + c));
      }
      here(round) = make_uint4(key[0] | key[1] << 16, key[2] | key[3] << 16, key[4] | key[5] << 16,
                               key[6] | key[7] << 16);
    }
    return best;
  }

  // The m-th of the warp's bests; 0 if there are fewer.
  __device__ __forceinline__ void find_bound(int m) {
    const std::uint32_t own = shared_.best[threadIdx.x];
    const auto all = reinterpret_cast<const uint4*>(shared_.best + 32 * warp_);
    int better = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint4 others = all[i];
      better += (others.x > own) + (others.y > own) + (others.z > own) + (others.w > own);
    }
    const std::uint32_t bound = __reduce_min_sync(kAllLanes, better < m ? own : kNothing);
    if (lane_ == 0) shared_.bounds[warp_] = bound;
  }

  // Everything that reaches the bound.
  __device__ __forceinline__ void collect() {
    std::uint32_t bound = kNothing;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) bound = min(bound, shared_.bounds[w]);
#pragma unroll 1
    for (int round = 0; round < rounds_; ++round) {
      const int first = first_block(round);
      const uint4 keys = here(round);
      std::uint32_t found[kMostTogether];
      unsigned reach = 0;  // one bit for each
#pragma unroll
      for (int c = 0; c < kMostTogether; ++c) {
        const std::uint32_t key = word(keys, c / 2) >> (c % 2 * 16) & 0xffff;
        found[c] = unique(key, first + c);
        const bool candidate = c < together_ && is_candidate(first + c);
        reach |= candidate && found[c] >= bound ? 1u << c : 0;
      }
      const int count = __popc(reach);
      int before = 0;  // of lanes to the left
      int total = 0;
#pragma unroll
      for (int bit = 0; bit < 4; ++bit) {
        const unsigned lanes = __ballot_sync(kAllLanes, (count >> bit & 1) != 0);
        before += __popc(lanes & ((1u << lane_) - 1)) << bit;
        total += __popc(lanes) << bit;
      }
      int place = 0;
      if (lane_ == 0) place = atomicAdd(&shared_.count, total);
      place = __shfl_sync(kAllLanes, place, 0) + before;
#pragma unroll
      for (int c = 0; c < kMostTogether; ++c) {
        const int at = place + __popc(reach & ((1u << c) - 1));
        if ((reach >> c & 1) != 0 && at < Shared::kMaxFound) shared_.found[at] = found[c];
      }
    }
  }

  __device__ __forceinline__ void rank(int count, int need, std::int32_t* out) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      const std::uint32_t own = shared_.found[i];
      int better = 0;
#pragma unroll 4
      for (int j = 0; j < count; j += 4) {  // zeros behind the last one
        const uint4 others = *reinterpret_cast<const uint4*>(shared_.found + j);
        better += (others.x > own) + (others.y > own) + (others.z > own) + (others.w > own);
      }
      if (better < need) out[better] = static_cast<std::int32_t>(0xffff - (own & 0xffff));
    }
  }

  // Where more keys reach the bound than there is room for.
  __device__ __forceinline__ void choose_by_digits(int need, std::int32_t* out) {
    shared_.radix.clear();
#pragma unroll 1
    for (int round = 0; round < rounds_; ++round) {
      // In the order of the blocks.
      const uint4 keys = here(round);
      __syncthreads();
#pragma unroll
      for (int c = 0; c < kMostTogether; ++c) {
        if (c < together_ && first_block(round) + c < end_) {
          shared_.keys[first_block(round) + c] =
              static_cast<std::uint16_t>(word(keys, c / 2) >> (c % 2 * 16));
        }
      }
    }
    __syncthreads();
    choose_blocks<kThreads>(shared_.keys, first_, end_, need, kBf16KeyBits, shared_.radix, out);
  }

  const std::uint32_t* const keys_;
  const int first_, end_;
  const int together_;
  const int rounds_;
  Shared& shared_;
  const int warp_, lane_;
};

}  // namespace infllm::cuda::decode
