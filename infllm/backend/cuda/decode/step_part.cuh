// SPDX-License-Identifier: Apache-2.0
//
// What a thread block that does one part of one row of a whole step (step_args.cuh) knows of it,
// and those of its steps that are the same however it reads: from logits to normalisers, from
// logits to keys, and what is written in the end.
//
// A warp takes 32 pooled keys at a time, four tiles of eight, and heads are the rows of the product
// (direct_tile.cuh): x[t][2 r + j] is the logit of head lane / 4 + 8 r and of window
// 8 t + 2 (lane % 4) + j.
#pragma once

#include <climits>

#include "infllm/backend/cuda/decode/direct_tile.cuh"
#include "infllm/backend/cuda/decode/exchange.cuh"
#include "infllm/backend/cuda/decode/normaliser.cuh"
#include "infllm/backend/cuda/decode/step_args.cuh"
#include "infllm/backend/cuda/decode/top_candidates.cuh"

namespace infllm::cuda::decode {

inline constexpr int kItemTiles = 4;
static_assert(kItemTiles * kTileRows == kItemBlocks * kFineRows);

struct StepShared {
  float2 of_warps[kStepWarps][kRowHeads];  // normalisers: top and sum
  float lse[kRowHeads];                    // of the whole row
};

class StepPart {
 protected:
  // Part `part` of row `row`, counted through the heads of all sequences.
  __device__ __forceinline__ StepPart(const StepArgs& args, const Sequence& sequence, int row,
                                      int head_kv, int part, StepShared& shared)
      : a_(args),
        sequence_(sequence),
        step_(shared),
        warp_(static_cast<int>(threadIdx.x / 32)),
        lane_(static_cast<int>(threadIdx.x % 32)),
        part_(part),
        parts_(args.parts),
        place_(kStepWarps * part + warp_),
        places_(kStepWarps * args.parts),
        head_kv_(head_kv),
        group_(args.heads_q / args.pool.map.heads),
        row_(row),
        own_((sequence.length - 1) / kPageTokens),
        candidates_end_(max(0, own_ + 1 - args.local_blocks)),
        items_((candidates_end_ + kItemBlocks - 1) / kItemBlocks),
        forced_(own_, args.init_blocks, args.local_blocks,
                sequence.sparse ? args.columns : INT_MAX),
        fine_(fine_rows(args.pool, head_kv, sequence.length)),
        normaliser_(args.fine_normaliser ? fine_
                                         : coarse_rows(args.pool, head_kv, sequence.length)) {}

  __device__ __forceinline__ bool chooses() const { return forced_.free > 0; }

  template <typename T, int kDim>
  __device__ __forceinline__ const T* queries(const void* all) const {
    return static_cast<const T*>(all) +
           (std::int64_t{sequence_.first_token} * a_.heads_q + head_kv_ * group_) * kDim;
  }
  __device__ __forceinline__ std::uint32_t* result_words() const {
    return a_.results + row_ * parts_ * kPartWords;
  }
  __device__ __forceinline__ std::uint32_t* keys() const { return a_.keys + row_ * a_.key_stride; }

  // Adds a tile's windows to this warp's normalisers; exist: the first and the second of this lane.
  __device__ __forceinline__ void normalise(const float (&x)[4], bool first, bool second) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      normalisers_[r].add(first ? x[2 * r] * a_.score_scale : -kInfinity,
                          second ? x[2 * r + 1] * a_.score_scale : -kInfinity);
    }
  }

  // This part's normalisers of all heads, for all parts.
  __device__ __forceinline__ void publish_normalisers() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      normalisers_[r].template merge_lanes<1, 4>();
      if (lane_ % 4 == 0) {
        step_.of_warps[warp_][lane_ / 4 + 8 * r] = {normalisers_[r].top, normalisers_[r].sum};
      }
    }
    __syncthreads();
    if (threadIdx.x >= kRowHeads * kStepWarps) return;
    const int head = static_cast<int>(threadIdx.x / kStepWarps);
    const float2 one = step_.of_warps[threadIdx.x % kStepWarps][head];
    Normaliser all;
    all.top = one.x;
    all.sum = one.y;
    all.template merge_lanes<1, kStepWarps>();
    if (threadIdx.x % kStepWarps == 0) publish(normaliser_cell(head, part_), word_of(all.lse()));
  }

  // The logarithm of every head's sum over all parts; heads that do not exist, or that have nothing
  // to be normalised by, get +inf and so no weight.
  template <int kMaxParts>
  __device__ __forceinline__ void gather_normalisers() {
    constexpr int kLanes = kStepThreads / kRowHeads;
    const int head = static_cast<int>(threadIdx.x / kLanes);
    const int lane = static_cast<int>(threadIdx.x % kLanes);
    const int count = (parts_ - lane + kLanes - 1) / kLanes;
    std::uint32_t words[kMaxParts / kLanes];
    take(normaliser_cell(head, lane), kLanes, count, words);
    Normaliser all;
#pragma unroll
    for (int i = 0; i < kMaxParts / kLanes; ++i) {
      if (i < count) all.top = fmaxf(all.top, __uint_as_float(words[i]));
    }
    const float base = all.top == -kInfinity ? 0 : all.top;
#pragma unroll
    for (int i = 0; i < kMaxParts / kLanes; ++i) {
      if (i < count) all.sum += tile::fast_exp2(__uint_as_float(words[i]) - base);
    }
    all.template merge_lanes<1, kLanes>();
    if (lane == 0) step_.lse[head] = head < group_ && all.sum > 0 ? all.lse() : kInfinity;
    __syncthreads();
  }

  // The score of one of an item's windows, number score_window().
  __device__ __forceinline__ float score(const float (&x)[kItemTiles][4]) const {
    const float lse[2] = {step_.lse[lane_ / 4], step_.lse[lane_ / 4 + 8]};
    float s[2 * kItemTiles];  // of window 8 t + 2 (lane % 4) + j, two of its heads
#pragma unroll
    for (int t = 0; t < kItemTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        s[2 * t + j] = tile::fast_exp2(x[t][j] * a_.score_scale - lse[0]) +
                       tile::fast_exp2(x[t][2 + j] * a_.score_scale - lse[1]);
      }
    }
    // Over the lanes that have the other heads; each keeps half of its windows, three times, and so
    // one in the end: t is lane / 8, j is lane / 4 % 2.
#pragma unroll
    for (int half = kItemTiles; half > 0; half /= 2) {
      const bool upper = (lane_ & 4 * half) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float given = upper ? s[i] : s[half + i];
        s[i] = (upper ? s[half + i] : s[i]) + __shfl_xor_sync(kAllLanes, given, 4 * half);
      }
    }
    return s[0];
  }
  __device__ __forceinline__ int score_window() const {
    return lane_ / 8 * 8 + lane_ % 4 * 2 + lane_ / 4 % 2;
  }
  // Keys of an item's eight blocks, from the score of window score_window() if that exists.
  __device__ __forceinline__ void publish_keys(float score, bool exists, int item) const {
    const std::uint32_t last = exists ? sort_key(score, true) : 0;
    std::uint32_t best = max(last, __shfl_xor_sync(kAllLanes, last, 1));
    best = max(best, __shfl_xor_sync(kAllLanes, best, 4));
    if (lane_ % 2 == 0) return;
    const int block = kItemBlocks * item + score_window() / kFineRows;
    if ((lane_ & 4) == 0) {
      publish(best_half(keys(), block), best);
    } else if (block + 1 < kItemBlocks * items_) {  // has the last window of a block
      publish(overlap_half(keys(), block + 1), last);
    } else {
      publish(overlap_half(keys(), 0), 0);
    }
  }

  // Where output d of one of the group's heads belongs.
  template <typename T, int kDim>
  __device__ __forceinline__ T* output(int head, int d) const {
    return static_cast<T*>(a_.o) +
           (std::int64_t{sequence_.first_token} * a_.heads_q + head_kv_ * group_ + head) * kDim + d;
  }
  __device__ __forceinline__ void store_lse(int head, float top, float sum) const {
    if (a_.lse == nullptr) return;
    a_.lse[std::int64_t{head_kv_ * group_ + head} * a_.batch.num_tokens + sequence_.first_token] =
        sum > 0 ? (top + __log2f(sum)) * kLn2 : -kInfinity;
  }

  // Ascending, -1 behind the last one. list: the blocks chosen freely, in any order.
  __device__ __forceinline__ void write_selection(const std::int32_t* list) const {
    std::int32_t* const out =
        a_.selection +
        (std::int64_t{head_kv_} * a_.batch.num_tokens + sequence_.first_token) * a_.columns;
    for (int i = static_cast<int>(threadIdx.x); i < a_.columns; i += kStepThreads) {
      if (i < forced_.free) {
        const int block = list[i];
        int before = 0;
#pragma unroll 4
        for (int j = 0; j < forced_.free; ++j) before += list[j] < block ? 1 : 0;
        out[forced_.sinks + before] = block;
      } else {
        const int n = i - forced_.free;  // among the forced ones
        const int local = forced_.first_local + n - forced_.sinks;
        out[n < forced_.sinks ? n : i] = n < forced_.sinks ? n : local <= own_ ? local : -1;
      }
    }
  }

  // Normalisers and keys of the row, by `threads` threads, when every part has sent results and so
  // none looks at them any more.
  __device__ __forceinline__ void clear_cells(int thread, int threads) const {
#pragma unroll 1
    for (int i = thread; i < kRowHeads * parts_; i += threads) {
      publish(normaliser_cell(0, i), kNothing);
    }
#pragma unroll 1
    for (int i = 4 * thread; i < kItemBlocks * items_; i += 4 * threads) {
      publish(keys() + i, make_uint4(kNothing, kNothing, kNothing, kNothing));
    }
  }

  const StepArgs& a_;
  const Sequence& sequence_;
  StepShared& step_;
  const int warp_, lane_;
  const int part_, parts_;
  const int place_, places_;  // among the row's warps
  const int head_kv_, group_;
  const int row_;             // among all (sequence, KV head)
  const int own_;             // block of the token
  const int candidates_end_;  // blocks from here on are forced, or come after the token's own
  const int items_;           // to be scored
  const Forced forced_;
  const PooledRows fine_, normaliser_;

 private:
  __device__ __forceinline__ std::uint32_t* normaliser_cell(int head, int part) const {
    return a_.normalisers + (row_ * kRowHeads + head) * parts_ + part;
  }

  Normaliser normalisers_[2];
};

}  // namespace infllm::cuda::decode
