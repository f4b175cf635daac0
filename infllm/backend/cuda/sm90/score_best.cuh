// SPDX-License-Identifier: Apache-2.0
//
// The best blocks of a token out of a stream that is never stored: a short list in shared memory of
// those that may still be among them. A block enters when it beats the list's floor; when the list
// is full, the warp cuts it down to its best `wanted` entries (or a few more) and raises the floor
// to the worst of them. At least `wanted` blocks are at or above the floor at any time, so what is
// turned away could not have been chosen, and the result is exact.
//
// A score and a block make one integer whose order is that of preference: higher scores first, then
// lower blocks. No two are equal, so the best `wanted` are always well defined. Blocks come in
// ascending order and cuts keep it, so the list needs no sorting either.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "infllm/backend/cuda/tile/control.cuh"

namespace infllm::cuda::sm90 {

inline constexpr int kListCapacity = 256;
inline constexpr int kListSlack = 32;       // more than wanted after a cut
inline constexpr int kMostWanted = 128;     // leaves room for at least three offers between cuts
inline constexpr int kMostBlocks = 0xffff;  // that a 32-bit key can tell apart
inline constexpr unsigned kWarp = 0xffffffff;

// The bf16 score above the block: ScoreRounding::kBF16.
struct RoundedKey {
  using Type = std::uint32_t;
  static __device__ Type make(float score, int block) {
    return tile::pack2<__nv_bfloat16>(0, score) + static_cast<Type>(kMostBlocks - block);
  }
  static __device__ int block(Type key) { return kMostBlocks - static_cast<int>(key & 0xffff); }
  static __device__ Type lowest(Type key) { return __reduce_min_sync(kWarp, key); }
  static __device__ Type highest(Type key) { return __reduce_max_sync(kWarp, key); }
};

// The whole score: ScoreRounding::kNone.
struct ExactKey {
  using Type = std::uint64_t;
  static __device__ Type make(float score, int block) {
    return static_cast<Type>(__float_as_uint(score)) << 32 | static_cast<Type>(kMostBlocks - block);
  }
  static __device__ int block(Type key) { return kMostBlocks - static_cast<int>(key & 0xffff); }
  static __device__ Type lowest(Type key) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) key = min(key, __shfl_xor_sync(kWarp, key, lanes));
    return key;
  }
  static __device__ Type highest(Type key) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) key = max(key, __shfl_xor_sync(kWarp, key, lanes));
    return key;
  }
};

// A number for each of a warp's tokens: in all lanes if there is one token, else in lane t.
template <typename T, int kTokens>
class PerToken {
 public:
  __device__ void fill(T value) { mine_ = value; }
  __device__ T get(int token) const {
    return kTokens == 1 ? mine_ : __shfl_sync(kWarp, mine_, token);
  }
  __device__ void set(int token, T value) {
    if (kTokens == 1 || static_cast<int>(threadIdx.x % 32) == token) mine_ = value;
  }

 private:
  T mine_;
};

// The lists of a warp's tokens. All calls are made by the whole warp.
template <typename Key, int kTokens>
class BestBlocks {
 public:
  using Type = typename Key::Type;

  __device__ explicit BestBlocks(Type* lists) : lists_(lists) { clear(); }

  __device__ void clear() {
    count_.fill(0);
    floor_.fill(0);
  }

  // Each lane offers one block, or none; lanes and calls in ascending order of blocks.
  __device__ void offer(int token, float score, int block, bool candidate, int wanted) {
    const Type key = Key::make(score, block);
    const Type floor = floor_.get(token);
    const bool accepted = candidate && key > floor;
    const unsigned lanes = __ballot_sync(kWarp, accepted);
    if (lanes == 0) return;
    int count = count_.get(token);
    if (accepted) list(token)[count + __popc(lanes & lanes_below())] = key;
    count += __popc(lanes);
    if (count > kListCapacity - 32) count = cut(token, count, wanted, wanted + kListSlack);
    count_.set(token, count);
  }

  // Leaves the `wanted` best in the list, which has at least as many, ascending by block.
  __device__ void finish(int token, int wanted) { cut(token, count_.get(token), wanted, wanted); }
  __device__ int chosen(int token, int i) const { return Key::block(list(token)[i]); }

 private:
  static __device__ unsigned lanes_below() { return (1u << threadIdx.x % 32) - 1; }
  __device__ Type* list(int token) const { return lists_ + token * kListCapacity; }

  // Keeps the best of `count`: at least at_least, at most at_most. Returns how many.
  __device__ int cut(int token, int count, int at_least, int at_most) {
    constexpr int kPerLane = kListCapacity / 32;
    const int lane = threadIdx.x % 32;
    Type* const entries = list(token);
    __syncwarp();
    Type key[kPerLane];
    Type low = ~Type{0};
    Type high = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool there = i * 32 + lane < count;
      key[i] = there ? entries[i * 32 + lane] : 0;
      low = there ? min(low, key[i]) : low;
      high = max(high, key[i]);
    }
    low = Key::lowest(low);
    high = Key::highest(high);
    // At least at_least keys reach `low`, fewer pass `high`.
    while (count > at_most) {
      const Type middle = low + (high - low + 1) / 2;
      int reach = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) reach += key[i] >= middle ? 1 : 0;
      reach = __reduce_add_sync(kWarp, reach);
      if (reach >= at_least) {
        low = middle;
        count = reach;
      } else {
        high = middle - 1;
      }
    }
    int kept = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool keep = key[i] >= low;
      const unsigned lanes = __ballot_sync(kWarp, keep);
      if (keep) entries[kept + __popc(lanes & lanes_below())] = key[i];
      kept += __popc(lanes);
    }
    __syncwarp();
    floor_.set(token, low - 1);
    return kept;
  }

  Type* lists_;
  PerToken<int, kTokens> count_;
  PerToken<Type, kTokens> floor_;
};

}  // namespace infllm::cuda::sm90
