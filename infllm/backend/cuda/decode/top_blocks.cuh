// SPDX-License-Identifier: Apache-2.0
//
// The best of up to kMaxCandidates blocks, by one thread block of kThreads, without sorting: find
// the K-th largest key, eight bits of it at a time, by counting how often they occur; then write
// the ids of the keys above it and of the first ones that equal it.
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
inline constexpr int kBf16KeyBits = 15;
inline constexpr int kFloatKeyBits = 31;

// What is known of a block after its windows were scored: the best of the four that begin in it,
// and the last of them, which overlaps the next block too.
struct BlockKeys {
  std::uint32_t best;
  std::uint32_t last;
};

inline constexpr int kMaxCandidates = 16384;  // 1M tokens

template <int kThreads>
struct TopBlocksShared {
  // By all threads, with a barrier of them before choose_blocks().
  __device__ __forceinline__ void clear() {
    for (int i = static_cast<int>(threadIdx.x); i < 4 * 256; i += kThreads) counts[0][i] = 0;
  }

  std::uint32_t counts[4][256];  // of a digit's values, for each digit
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

    int wanted_equals = need;
    const std::uint32_t least = kth_largest(key, count, key_bits, shared, wanted_equals);

    // In the lower half how many are above it, in the upper one how many equal it.
    std::uint32_t mine = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i < count) mine += key[i] > least ? 1u : key[i] == least ? 1u << 16 : 0u;
    }
    const std::uint32_t left = exclusive_sum(mine, shared);
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
  // From shared memory or past L1: other blocks wrote them.
  __device__ __forceinline__ static BlockKeys load(const BlockKeys* keys, int block) {
    BlockKeys found;
    asm volatile("ld.volatile.v2.u32 {%0, %1}, [%2];"
                 : "=r"(found.best), "=r"(found.last)
                 : "l"(keys + block));
    return found;
  }

  // The largest number that at least `need` keys reach; leaves in `need` how many of those that
  // equal it belong to them.
  __device__ __forceinline__ static std::uint32_t kth_largest(const std::uint32_t (&key)[kRun],
                                                              int count, int key_bits,
                                                              Shared& shared, int& need) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    std::uint32_t known = 0;  // the digits above `shift + 8`
    int digit = 0;
    for (int shift = key_bits - 8; shift > -8; shift -= 8, ++digit) {
      const int low = max(shift, 0);  // the last digit may overlap the one before: it agrees
      std::uint32_t(&counts)[256] = shared.counts[digit];
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (i < count && (digit == 0 || key[i] >> (shift + 8) == known)) {
          atomicAdd(&counts[key[i] >> low & 0xff], 1u);
        }
      }
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

  __device__ __forceinline__ static std::uint32_t exclusive_sum(std::uint32_t mine,
                                                                Shared& shared) {
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
