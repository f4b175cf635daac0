// SPDX-License-Identifier: Apache-2.0
//
// The best of up to kMaxCandidates blocks, by one thread block of kThreads, without sorting: find
// the K-th largest key by counting, two bits of it at a time, then write the ids of the keys above
// it and of the first ones that equal it.
//
// Every thread keeps a run of neighbouring candidates in registers, so that a prefix sum over the
// threads gives ascending ids and breaks ties towards the lower index.
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
inline constexpr int kBf16KeyBits = 16;
inline constexpr int kFloatKeyBits = 32;

// What is known of a block after its windows were scored: the best of the four that begin in it,
// and the last of them, which overlaps the next block too.
struct BlockKeys {
  std::uint32_t best;
  std::uint32_t last;
};

inline constexpr int kMaxCandidates = 16384;  // 1M tokens

template <int kThreads>
struct TopBlocksShared {
  uint2 counts[2][kThreads / 32];
  std::uint32_t sums[kThreads / 32];
};

// With runs of up to kRun candidates a thread.
template <int kThreads, int kRun>
class TopBlocks {
 public:
  using Shared = TopBlocksShared<kThreads>;

  __device__ __forceinline__ static void choose(const BlockKeys* keys, int first, int end, int need,
                                                int key_bits, Shared& shared, std::int32_t* out) {
    const int run = (end - first + kThreads - 1) / kThreads;
    const int begin = first + static_cast<int>(threadIdx.x) * run;
    const int count = min(run, end - begin);

    std::uint32_t key[kRun];
    std::uint32_t before = begin > 0 && count > 0 ? load(keys, begin - 1).last : 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const BlockKeys block = i < count ? load(keys, begin + i) : BlockKeys{};
      key[i] = max(block.best, before);
      before = block.last;
      if (i >= count) key[i] = 0;
    }

    const std::uint32_t least = kth_largest(key, need, key_bits, shared);

    // In the lower half how many are above it, in the upper one how many equal it.
    std::uint32_t mine = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i < count) mine += key[i] > least ? 1u : key[i] == least ? 1u << 16 : 0u;
    }
    std::uint32_t total;
    const std::uint32_t left = exclusive_sum(mine, shared, total);
    const int wanted_equals = need - static_cast<int>(total & 0xffff);
    int equals = static_cast<int>(left >> 16);
    int rank = static_cast<int>(left & 0xffff) + min(equals, wanted_equals);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i >= count) continue;
      const bool equal = key[i] == least;
      if (key[i] > least || (equal && equals < wanted_equals)) out[rank++] = begin + i;
      equals += equal ? 1 : 0;
    }
  }

 private:
  __device__ __forceinline__ static BlockKeys load(const BlockKeys* keys, int block) {
    const uint2 pair = __ldcg(reinterpret_cast<const uint2*>(keys) + block);
    return {pair.x, pair.y};
  }

  // The largest number that at least `need` keys reach. Keys that do not exist are 0, which every
  // number reaches, so they are never asked for.
  __device__ __forceinline__ static std::uint32_t kth_largest(const std::uint32_t (&key)[kRun],
                                                              int need, int key_bits,
                                                              Shared& shared) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    std::uint32_t known = 0;
    int buffer = 0;
    for (int shift = key_bits - 2; shift >= 0; shift -= 2, buffer ^= 1) {
      const std::uint32_t step = 1u << shift;
      std::uint32_t one_two = 0;  // how many reach known + step, and known + 2 step
      std::uint32_t three = 0;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        one_two += key[i] >= known + step ? 1u : 0u;
        one_two += key[i] >= known + 2 * step ? 1u << 16 : 0u;
        three += key[i] >= known + 3 * step ? 1u : 0u;
      }
      one_two = __reduce_add_sync(kAllLanes, one_two);
      three = __reduce_add_sync(kAllLanes, three);
      if (lane == 0) shared.counts[buffer][warp] = {one_two, three};
      __syncthreads();  // one a step: the next step counts in the other buffer
      uint2 all = lane < kThreads / 32 ? shared.counts[buffer][lane] : uint2{};
      all.x = __reduce_add_sync(kAllLanes, all.x);
      all.y = __reduce_add_sync(kAllLanes, all.y);
      const auto reached = static_cast<std::uint32_t>(need);
      known += all.y >= reached              ? 3 * step
               : (all.x >> 16) >= reached    ? 2 * step
               : (all.x & 0xffff) >= reached ? step
                                             : 0;
    }
    return known;
  }

  __device__ __forceinline__ static std::uint32_t exclusive_sum(std::uint32_t mine, Shared& shared,
                                                                std::uint32_t& total) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    std::uint32_t sum = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const std::uint32_t left = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += left;
    }
    if (lane == 31) shared.sums[warp] = sum;
    __syncthreads();
    const std::uint32_t warp_sum = lane < kThreads / 32 ? shared.sums[lane] : 0;
    total = __reduce_add_sync(kAllLanes, warp_sum);
    return __reduce_add_sync(kAllLanes, lane < warp ? warp_sum : 0) + sum - mine;
  }
};

// Writes the `need` best of blocks first .. end - 1, 0 < need <= end - first, ascending.
template <int kThreads>
__device__ __forceinline__ void choose_blocks(const BlockKeys* keys, int first, int end, int need,
                                              int key_bits, TopBlocksShared<kThreads>& shared,
                                              std::int32_t* out) {
  // As few comparisons as 128K and 256K tokens need, if it is not more.
  constexpr int kLongest = kMaxCandidates / kThreads;
  const int candidates = end - first;
  if (candidates <= kThreads * kLongest / 8) {
    TopBlocks<kThreads, kLongest / 8>::choose(keys, first, end, need, key_bits, shared, out);
  } else if (candidates <= kThreads * kLongest / 4) {
    TopBlocks<kThreads, kLongest / 4>::choose(keys, first, end, need, key_bits, shared, out);
  } else {
    TopBlocks<kThreads, kLongest>::choose(keys, first, end, need, key_bits, shared, out);
  }
}

}  // namespace infllm::cuda::decode
