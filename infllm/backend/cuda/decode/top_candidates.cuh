// SPDX-License-Identifier: Apache-2.0
//
// The best blocks of a row, by every one of its parts, from keys that arrive in words of global
// memory (exchange.cuh).
//
// 1. A thread takes up to eight blocks, several times where there are many, and keeps the best key.
//    Runs of 32 blocks go to the warps in turn, so that each warp sees a sample of the whole row.
// 2. Of a warp's 32 best the m-th is at most the K-th best of all, if m warps are at least K: the
//    least of these over the warps is a bound that few more than K keys reach.
// 3. Each warp sorts those that it has, and looks each of them up among those of the other warps:
//    how many are better is its place in the list.
//
// Keys are compared together with block numbers, lower ones first, so none equals another, and the
// list does not depend on the order in which threads run.
#pragma once

#include "infllm/backend/cuda/decode/exchange.cuh"
#include "infllm/backend/cuda/decode/top_blocks.cuh"

namespace infllm::cuda::decode {

// A block's word: the best key of the windows that begin in it, and that of the last window of the
// block before, which overlaps it. The halves come from different warps.
__device__ __forceinline__ std::uint16_t* best_half(std::uint32_t* words, int block) {
  return reinterpret_cast<std::uint16_t*>(words + block) + 1;
}
__device__ __forceinline__ std::uint16_t* overlap_half(std::uint32_t* words, int block) {
  return reinterpret_cast<std::uint16_t*>(words + block);
}
// Keys have 15 bits.
__device__ __forceinline__ bool has_both_halves(std::uint32_t words) {
  return (words & 0x80008000) == 0;
}

template <int kThreads>
struct TopCandidatesShared {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kMaxFound = 128;  // of a warp, and one more

  // By all threads, with a barrier of them before choose().
  __device__ __forceinline__ void clear() {
    static_assert(kWarps * kMaxFound == 4 * kThreads);
    reinterpret_cast<uint4*>(found)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    reinterpret_cast<uint4*>(sorted)[threadIdx.x] = make_uint4(0, 0, 0, 0);
  }

  union {
    struct {
      alignas(16) std::uint32_t found[kWarps][kMaxFound];   // zeros behind the last one
      alignas(16) std::uint32_t sorted[kWarps][kMaxFound];  // the best first
    };
    TopBlocksShared<kThreads> radix;  // if there are too many
  };
  alignas(16) std::uint32_t best[kThreads];
  alignas(16) std::uint32_t bounds[kWarps];
  alignas(16) int counts[kWarps];     // of those found
  alignas(16) std::uint16_t keys[8];  // [key_bytes() / 2]

  // What a row of so many blocks takes behind this.
  static std::size_t key_bytes(int blocks) {
    return sizeof(std::uint16_t) * 8 * kThreads * ((blocks + 8 * kThreads - 1) / (8 * kThreads));
  }
};

template <int kThreads>
class TopCandidates {
 public:
  using Shared = TopCandidatesShared<kThreads>;
  static constexpr int kMaxNeed = kThreads;  // as many bests are looked at

  // words: of blocks 0 .. end - 1, and of up to 7 more if end is no multiple of 8; to be chosen
  // among those from `first` on.
  __device__ __forceinline__ TopCandidates(const std::uint32_t* words, int first, int end,
                                           Shared& shared)
      : words_(words),
        first_(first),
        end_(end),
        rounds_((end + kRoundBlocks - 1) / kRoundBlocks),
        shared_(shared),
        warp_(static_cast<int>(threadIdx.x / 32)),
        lane_(static_cast<int>(threadIdx.x % 32)),
        slot_(kRun * (kWarps * (lane_ / kRun) + warp_) + lane_ % kRun) {}

  // Leaves the best `need` <= kMaxNeed blocks in `out`, in some order that is always the same; by
  // all threads, with a barrier at the end. Long before, expect(block, i) is called for most of
  // those that will be chosen, and a few others perhaps; i counts them, from 0, once each.
  template <typename Expect>
  __device__ __forceinline__ void choose(int need, std::int32_t* out, const Expect& expect) {
    shared_.best[threadIdx.x] = take_all();
    __syncwarp();
    find_bound((need + kWarps - 1) / kWarps, expect);
    __syncthreads();
    collect();
    __syncwarp();
    sort();
    __syncthreads();
    const int most = most_found();
    if (most >= Shared::kMaxFound) {
      choose_by_digits(first_, end_, shared_, need, out);
    } else {
      rank(most, need, out);
    }
    __syncthreads();
  }

 private:
  static constexpr int kWarps = Shared::kWarps;
  static constexpr int kPiece = 4;  // blocks that a thread reads at once
  static constexpr int kPieces = 2;
  static constexpr int kRun = 8;  // lanes whose pieces are neighbours
  static constexpr int kRoundBlocks = kPieces * kPiece * kThreads;

  // Block c of this thread's in a round.
  __device__ __forceinline__ int block(int round, int c) const {
    return kPiece * (kThreads * (kPieces * round + c / kPiece) + slot_) + c % kPiece;
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
      uint4 pieces[kPieces] = {};
      bool missing;
      do {
        missing = false;
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
          if (block(round, kPiece * j) < end_) look(words_ + block(round, kPiece * j), pieces[j]);
        }
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
          missing |= !has_both_halves(pieces[j].x | pieces[j].y | pieces[j].z | pieces[j].w);
        }
      } while (__any_sync(kAllLanes, missing));
      std::uint32_t key[kPieces * kPiece];
#pragma unroll
      for (int c = 0; c < kPieces * kPiece; ++c) {
        const std::uint32_t both = word(pieces[c / kPiece], c % kPiece);
        key[c] = max(both >> 16, both & 0xffff);
        if (is_candidate(block(round, c))) best = max(best, unique(key[c], block(round, c)));
      }
      here(round) = make_uint4(key[0] | key[1] << 16, key[2] | key[3] << 16, key[4] | key[5] << 16,
                               key[6] | key[7] << 16);
    }
    return best;
  }

  // The m-th of the warp's bests; 0 if there are fewer. About m of a warp's are chosen, so
  // three quarters of them can be expected to be.
  template <typename Expect>
  __device__ __forceinline__ void find_bound(int m, const Expect& expect) {
    const std::uint32_t own = shared_.best[threadIdx.x];
    const int better = count_better(own, shared_.best + 32 * warp_, 32);
    const std::uint32_t bound = __reduce_min_sync(kAllLanes, better < m ? own : kNothing);
    if (lane_ == 0) shared_.bounds[warp_] = bound;
    if (better < m - m / 4) {
      expect(static_cast<int>(0xffff - (own & 0xffff)), kWarps * better + warp_);
    }
  }

  // Of `count` numbers, with zeros behind them up to a multiple of 4.
  __device__ __forceinline__ static int count_better(std::uint32_t own, const std::uint32_t* all,
                                                     int count) {
    int better = 0;
#pragma unroll 4
    for (int j = 0; j < count; j += 4) {
      const uint4 others = *reinterpret_cast<const uint4*>(all + j);
      better += (others.x > own) + (others.y > own) + (others.z > own) + (others.w > own);
    }
    return better;
  }

  // Everything of the warp's that reaches the bound.
  __device__ __forceinline__ void collect() {
    std::uint32_t bound = kNothing;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) bound = min(bound, shared_.bounds[w]);
    int place = 0;
#pragma unroll 1
    for (int round = 0; round < rounds_; ++round) {
      const uint4 keys = here(round);
#pragma unroll
      for (int c = 0; c < kPieces * kPiece; ++c) {
        const std::uint32_t found =
            unique(word(keys, c / 2) >> (c % 2 * 16) & 0xffff, block(round, c));
        const bool reaches = is_candidate(block(round, c)) && found >= bound;
        const unsigned lanes = __ballot_sync(kAllLanes, reaches);
        const int at = place + __popc(lanes & ((1u << lane_) - 1));
        if (reaches && at < Shared::kMaxFound) shared_.found[warp_][at] = found;
        place += __popc(lanes);
      }
    }
    if (lane_ == 0) shared_.counts[warp_] = place;
  }

  __device__ __forceinline__ void sort() {
    const int count = min(shared_.counts[warp_], Shared::kMaxFound);
#pragma unroll 1
    for (int i = lane_; i < count; i += 32) {
      const std::uint32_t own = shared_.found[warp_][i];
      shared_.sorted[warp_][count_better(own, shared_.found[warp_], count)] = own;
    }
  }

  __device__ __forceinline__ int most_found() const {
    int most = 1;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) most = max(most, shared_.counts[w]);
    return most;
  }

  // By bisection of each warp's sorted ones, of which there are at most `most`.
  __device__ __forceinline__ void rank(int most, int need, std::int32_t* out) {
    const int half = 1 << (31 - __clz(most));
#pragma unroll 1
    for (int i = lane_; i < shared_.counts[warp_]; i += 32) {
      const std::uint32_t own = shared_.sorted[warp_][i];
      int better[kWarps] = {};
#pragma unroll 1
      for (int step = half; step > 0; step /= 2) {
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          if (shared_.sorted[w][better[w] + step - 1] > own) better[w] += step;
        }
      }
      int place = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) place += better[w];
      if (place < need) out[place] = static_cast<std::int32_t>(0xffff - (own & 0xffff));
    }
  }

  // Where more keys of a warp reach the bound than there is room for. A function of its own, since
  // it is seldom needed, and code that is executed should lie together.
  __device__ __noinline__ static void choose_by_digits(int first, int end, Shared& shared, int need,
                                                       std::int32_t* out) {
    TopCandidates(nullptr, first, end, shared).choose_by_digits(need, out);
  }
  __device__ __forceinline__ void choose_by_digits(int need, std::int32_t* out) {
#pragma unroll 1
    for (int round = 0; round < rounds_; ++round) {
      // In the order of the blocks.
      const uint4 keys = here(round);
      __syncthreads();
#pragma unroll
      for (int c = 0; c < kPieces * kPiece; ++c) {
        if (block(round, c) < end_) {
          shared_.keys[block(round, c)] =
              static_cast<std::uint16_t>(word(keys, c / 2) >> (c % 2 * 16));
        }
      }
    }
    shared_.radix.clear();
    __syncthreads();
    choose_blocks<kThreads>(shared_.keys, first_, end_, need, kBf16KeyBits, shared_.radix, out);
  }

  const std::uint32_t* const words_;
  const int first_, end_;
  const int rounds_;
  Shared& shared_;
  const int warp_, lane_;
  const int slot_;  // of this thread's pieces among those of all threads
};

}  // namespace infllm::cuda::decode
