// SPDX-License-Identifier: Apache-2.0
//
// The best blocks of many, by one thread block of kThreads, without sorting: find the K-th largest
// key, eight bits of it at a time, by counting how often they occur; then write the ids of the keys
// above it and of the first ones that equal it.
//
// Every warp has a run of neighbouring candidates and looks at 32 of them at a time, so that votes
// give ascending ids and break ties towards the lower index.
#pragma once

#include "infllm/backend/cuda/decode/row.cuh"

namespace infllm::cuda::decode {

// Scores as integers of the same order: 0 for what must lose against every number (-inf, NaN, no
// window), else the bits of a score, never negative, plus 1.
__device__ __forceinline__ std::uint32_t sort_key(float score, bool to_bf16) {
  if (!(score >= 0.0f)) return 0;
  return 1 + (to_bf16 ? std::uint32_t{__bfloat16_as_ushort(__float2bfloat16_rn(score))}
                      : __float_as_uint(score));
}
inline constexpr int kBf16KeyBits = 15;
inline constexpr int kFloatKeyBits = 31;

// What is known of a block after its windows were scored: the best of the four that begin in it,
// and the last of them, which overlaps the next block too.
struct BlockKeys {
  std::uint32_t best;
  std::uint32_t last;
};

template <int kThreads>
struct TopBlocksShared {
  // By all threads, with a barrier of them before choose_blocks().
  __device__ __forceinline__ void clear() {
    for (int i = static_cast<int>(threadIdx.x); i < 4 * 256; i += kThreads) counts[0][i] = 0;
  }

  std::uint32_t counts[4][256];  // of a digit's values, for each digit
  std::uint32_t above[kThreads / 32];
  std::uint32_t equal[kThreads / 32];
};

// From shared memory or past L1: other blocks wrote them.
__device__ __forceinline__ BlockKeys load_keys(const BlockKeys* keys, int block) {
  BlockKeys found;
  asm volatile("ld.volatile.v2.u32 {%0, %1}, [%2];"
               : "=r"(found.best), "=r"(found.last)
               : "l"(keys + block));
  return found;
}
// Of blocks that have what overlaps them already.
__device__ __forceinline__ BlockKeys load_keys(const std::uint16_t* keys, int block) {
  return {keys[block], 0};
}

// The largest number that at least `need` keys reach; leaves in `need` how many of those that equal
// it belong to them. By all threads; each(visit) calls visit(key) for those of one thread.
template <int kThreads, typename Each>
__device__ __forceinline__ std::uint32_t kth_largest(const Each& each, int key_bits, int& need,
                                                     TopBlocksShared<kThreads>& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::uint32_t known = 0;  // the digits above `shift + 8`
  int digit = 0;
#pragma unroll 1
  for (int shift = key_bits - 8; shift > -8; shift -= 8, ++digit) {
    const int low = max(shift, 0);  // the last digit may overlap the one before: it agrees
    std::uint32_t(&counts)[256] = shared.counts[digit];
    each([&](std::uint32_t key) {
      if (digit == 0 || key >> (shift + 8) == known) atomicAdd(&counts[key >> low & 0xff], 1u);
    });
    __syncthreads();
    // Every warp looks for the value of this digit: a lane has eight, lane 31 the largest.
    const uint4 first = reinterpret_cast<const uint4*>(counts)[2 * lane];
    const uint4 second = reinterpret_cast<const uint4*>(counts)[2 * lane + 1];
    const std::uint32_t value[8] = {first.x,  first.y,  first.z,  first.w,
                                    second.x, second.y, second.z, second.w};
    std::uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += value[i];
    std::uint32_t reached = sum;  // keys with at least this lane's values
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const std::uint32_t above = __shfl_down_sync(kAllLanes, reached, step);
      if (lane + step < 32) reached += above;
    }
    std::uint32_t above = reached - sum;
    int found = 8 * lane + 7;
#pragma unroll
    for (int i = 7; i > 0; --i) {
      if (above + value[i] < static_cast<std::uint32_t>(need) && found == 8 * lane + i) {
        above += value[i];
        --found;
      }
    }
    const unsigned enough = __ballot_sync(kAllLanes, reached >= static_cast<std::uint32_t>(need));
    const int owner = 31 - __clz(enough);
    need -= static_cast<int>(__shfl_sync(kAllLanes, above, owner));
    known = (low == 0 && shift < 0 ? known >> -shift << 8 : known << 8) |
            static_cast<std::uint32_t>(__shfl_sync(kAllLanes, found, owner));
  }
  return known;
}

template <int kThreads, typename Keys>  // BlockKeys, or what load_keys() takes
class TopBlocks {
 public:
  using Shared = TopBlocksShared<kThreads>;

  __device__ __forceinline__ TopBlocks(const Keys* keys, int first, int end, Shared& shared)
      : keys_(keys),
        shared_(shared),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32) {
    const int run = ((end - first + kWarps - 1) / kWarps + 31) / 32 * 32;
    begin_ = first + warp_ * run;
    end_ = min(end, begin_ + run);
  }

  __device__ __forceinline__ void choose(int need, int key_bits, std::int32_t* out) {
    int wanted_equals = need;
    const std::uint32_t least = kth_largest(
        [&](const auto& visit) {
#pragma unroll 2
          for (int i = begin_ + lane_; i < end_; i += 32) visit(load(i));
        },
        key_bits, wanted_equals, shared_);
    std::uint32_t above = 0;  // of this warp
    std::uint32_t equal = 0;
#pragma unroll 2
    for (int i = begin_; i < end_; i += 32) {
      const std::uint32_t key = load(i + lane_);
      above += __popc(__ballot_sync(kAllLanes, i + lane_ < end_ && key > least));
      equal += __popc(__ballot_sync(kAllLanes, i + lane_ < end_ && key == least));
    }
    if (lane_ == 0) {
      shared_.above[warp_] = above;
      shared_.equal[warp_] = equal;
    }
    __syncthreads();
    const bool left = lane_ < warp_;
    int rank = static_cast<int>(__reduce_add_sync(kAllLanes, left ? shared_.above[lane_] : 0));
    int equals = static_cast<int>(__reduce_add_sync(kAllLanes, left ? shared_.equal[lane_] : 0));
    const unsigned lower = (1u << lane_) - 1;
#pragma unroll 2
    for (int i = begin_; i < end_; i += 32) {
      const std::uint32_t key = load(i + lane_);
      const bool is_above = i + lane_ < end_ && key > least;
      const bool is_equal = i + lane_ < end_ && key == least;
      const unsigned all_above = __ballot_sync(kAllLanes, is_above);
      const unsigned all_equal = __ballot_sync(kAllLanes, is_equal);
      const int equals_before = equals + __popc(all_equal & lower);
      if (is_above || (is_equal && equals_before < wanted_equals)) {
        out[rank + __popc(all_above & lower) + min(equals_before, wanted_equals)] = i + lane_;
      }
      rank += __popc(all_above);
      equals += __popc(all_equal);
    }
  }

 private:
  static constexpr int kWarps = kThreads / 32;

  // The key of a candidate, 0 behind the last one.
  __device__ __forceinline__ std::uint32_t load(int block) const {
    if (block >= end_) return 0;
    const std::uint32_t best = load_keys(keys_, block).best;
    return block > 0 ? max(best, load_keys(keys_, block - 1).last) : best;
  }

  const Keys* const keys_;
  Shared& shared_;
  const int warp_, lane_;
  int begin_, end_;
};

// Writes the `need` best of blocks first .. end - 1, 0 < need <= end - first, ascending.
template <int kThreads, typename Keys>
__device__ __forceinline__ void choose_blocks(const Keys* keys, int first, int end, int need,
                                              int key_bits, TopBlocksShared<kThreads>& shared,
                                              std::int32_t* out) {
  TopBlocks<kThreads, Keys>(keys, first, end, shared).choose(need, key_bits, out);
}

}  // namespace infllm::cuda::decode
