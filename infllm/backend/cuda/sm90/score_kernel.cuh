// SPDX-License-Identifier: Apache-2.0
//
// The kernel of score_select: scores, group sums, block maxima and the best blocks, in one pass
// over the coarse pooled keys and one over the fine ones, with nothing but the selection written.
//
//   producer warp    streams tiles of 128 pooled keys into a ring in shared memory
//   warpgroup i      keeps 64 rows of queries (64 / G tokens) and meets every tile:
//                    pass 1: logits of normalising keys -> running log-sum-exp of each row
//                    pass 2: logits of fine keys -> probabilities -> sums over the G heads of a
//                            token -> best window of each block -> the token's list of best blocks
//
// G = 16 heads fill the sixteen rows that a warp owns of a matrix product, so a warp is a token and
// everything behind the product stays inside the warp; smaller groups put several tokens into one.
// Warpgroups share nothing but the ring, and take turns at the tensor cores: while one multiplies,
// the others compute exponentials. Blocks are persistent, and each warpgroup fetches the queries of
// its next item while it finishes the current one.
#pragma once

#include <algorithm>

#include "infllm/backend/cuda/sm90/score_best.cuh"
#include "infllm/backend/cuda/sm90/score_item.cuh"
#include "infllm/backend/cuda/sm90/score_rows.cuh"
#include "infllm/backend/cuda/sm90/shared_memory.cuh"
#include "infllm/backend/cuda/tile/ring.cuh"
#include "infllm/backend/cuda/tile/tma.cuh"
#include "infllm/backend/cuda/tile/wgmma.cuh"

namespace infllm::cuda::sm90 {

template <typename Element_, int kHeadDim_, int kGroup_, typename Key_>
struct ScoreShape {
  using Element = Element_;
  using Key = Key_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kGroup = kGroup_;
  static constexpr int kPanels = kHeadDim / kPanel;
  static constexpr int kListBytes = kListCapacity * static_cast<int>(sizeof(typename Key::Type));
  // Four, unless the lists of their tokens would leave no room for keys.
  static constexpr int kWarpgroups = 4 * 64 / kGroup * kListBytes <= 64 * 1024 ? 4 : 2;
  static constexpr int kWarps = 4 * kWarpgroups;      // of consumers
  static constexpr int kThreads = 32 * kWarps + 128;  // one of the last four warps produces
  static constexpr int kWarpTokens = 16 / kGroup;
  static constexpr int kGroupTokens = 64 / kGroup;            // of a warpgroup
  static constexpr int kTokens = kWarpgroups * kGroupTokens;  // of an item
  static_assert(kPageTokens % kTokens == 0);

  static constexpr int kStageBytes = kTileKeys * kHeadDim * 2;
  static constexpr int kOtherBytes =  // queries, sums, lists, barriers
      kWarpgroups * 64 * kHeadDim * 2 + kWarps * kWarpTokens * kTileKeys * 4 +
      kTokens * kListBytes + 256;
  static constexpr int kStages = std::min(6, (kSharedLimit - kOtherBytes) / kStageBytes);
  // 64 K registers among all warps; with two warpgroups there are enough for everybody.
  static constexpr bool kShiftsRegisters = kWarpgroups == 4;
  static constexpr int kComputeRegisters = 112;
  static constexpr int kFeedRegisters = 24;
  static_assert(kStages >= 2);
};

template <typename Shape>
struct ScoreMemory {
  using Element = typename Shape::Element;
  Element queries[Shape::kWarpgroups][Shape::kPanels][64 * kPanel];
  Element keys[Shape::kStages][Shape::kPanels][kTileKeys * kPanel];
  float sums[Shape::kWarps][Shape::kWarpTokens][kTileKeys];
  typename Shape::Key::Type best[Shape::kWarps][Shape::kWarpTokens * kListCapacity];
  std::uint64_t full[Shape::kStages];
  std::uint64_t empty[Shape::kStages];
  std::uint64_t queries_full[Shape::kWarpgroups];
};

// Named barriers, one for each warpgroup. 0 is __syncthreads().
inline constexpr int kTurn = 1;
inline constexpr int kQueriesRead = 5;

struct ScoreMaps {
  CUtensorMap queries;  // [D / 64][T][Hq][64]
  CUtensorMap fine;     // [B Hkv][D / 64][windows][64]
  CUtensorMap coarse;
};

template <typename Shape>
class ScoreProducer {
 public:
  __device__ ScoreProducer(const ScoreMaps& maps, const ScoreTask& task, ScoreMemory<Shape>& memory)
      : maps_(maps), task_(task), memory_(memory) {}

  __device__ void run() {
    for (std::int64_t i = blockIdx.x; i < task_.items; i += gridDim.x) {
      const ScoreItem item(task_, i, Shape::kTokens);
      if (!item.scored()) continue;
      stream(task_.fine_normaliser ? maps_.fine : maps_.coarse, item.plane, item.norm_windows);
      stream(maps_.fine, item.plane, item.score_windows);
    }
  }

 private:
  __device__ void stream(const CUtensorMap& map, int plane, int windows) {
    for (int window = 0; window < windows; window += kTileKeys) {
      std::uint64_t* const full = &memory_.full[ring_.slot];
      tile::mbarrier_wait(&memory_.empty[ring_.slot], ring_.phase ^ 1);
      tile::mbarrier_arrive_expect_tx(full, sizeof(memory_.keys[0]));
      tile::tma_load_4d(&map, full, memory_.keys[ring_.slot], 0, window, 0, plane);
      ring_.advance();
    }
  }

  const ScoreMaps& maps_;
  const ScoreTask& task_;
  ScoreMemory<Shape>& memory_;
  tile::RingCursor<Shape::kStages> ring_;
};

template <typename Shape>
class ScoreConsumer {
 public:
  __device__ ScoreConsumer(const ScoreMaps& maps, const ScoreTask& task, ScoreMemory<Shape>& memory,
                           int warp)
      : maps_(maps),
        task_(task),
        memory_(memory),
        warp_(warp),
        lane_(threadIdx.x % 32),
        best_(memory.best[warp]) {}

  __device__ void run() {
    load_queries(blockIdx.x);
    if (warpgroup() == Shape::kWarpgroups - 1) pass_turn();
    for (std::int64_t i = blockIdx.x; i < task_.items; i += gridDim.x) {
      const ScoreItem item(task_, i, Shape::kTokens);
      if (!item.exists()) continue;
      if (item.scored()) {
        tile::mbarrier_wait(&memory_.queries_full[warpgroup()], queries_phase_);
        queries_phase_ ^= 1;
        normalise(item);
        score(item);
        load_queries(i + gridDim.x);
      }
#pragma unroll 1
      for (int token = 0; token < Shape::kWarpTokens; ++token) write(item, token);
    }
    if (warpgroup() == 0) await_turn();  // a barrier is left as it was found
  }

 private:
  __device__ int warpgroup() const { return warp_ / 4; }
  // Of the warp's tokens, counted within the item.
  __device__ int first_token() const { return warp_ * Shape::kWarpTokens; }

  // One thread starts to fetch the queries of the first scored item from `index` on.
  __device__ void load_queries(std::int64_t index) {
    tile::named_barrier_sync(kQueriesRead + warpgroup(), 128);  // nobody reads the last ones
    if (warp_ % 4 != 0 || lane_ != 0) return;
    for (; index < task_.items; index += gridDim.x) {
      const ScoreItem item(task_, index, Shape::kTokens);
      if (!item.scored()) continue;
      std::uint64_t* const full = &memory_.queries_full[warpgroup()];
      tile::mbarrier_arrive_expect_tx(full, sizeof(memory_.queries[0]));
      tile::tma_load_4d(&maps_.queries, full, memory_.queries[warpgroup()], 0,
                        item.head * Shape::kGroup, item.token + warpgroup() * Shape::kGroupTokens,
                        0, tile::CacheHint::kEvictFirst);
      return;
    }
  }

  // Warpgroups take turns at the tensor cores. Left alone they fall into step: all multiply, then
  // all compute exponentials.
  __device__ void await_turn() { tile::named_barrier_sync(kTurn + warpgroup(), 256); }
  __device__ void pass_turn() {
    tile::named_barrier_arrive(kTurn + (warpgroup() + 1) % Shape::kWarpgroups, 256);
  }

  // The products of the warpgroup's queries with the ring's next tile of keys.
  __device__ void multiply(float (&x)[kTileValues]) {
    using Product = tile::Wgmma<typename Shape::Element, kTileKeys, tile::Major::kK>;
    constexpr int kSteps = Shape::kHeadDim / 16;
    tile::mbarrier_wait(&memory_.full[ring_.slot], ring_.phase);
    await_turn();
    tile::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int panel = step / (kPanel / 16);
      const std::uint64_t offset = step % (kPanel / 16) * tile::kStepKMajor;
      Product::ss(x, tile::smem_desc_k_major(memory_.queries[warpgroup()][panel]) + offset,
                  tile::smem_desc_k_major(memory_.keys[ring_.slot][panel]) + offset, step != 0);
      if (step == kSteps - 2) tile::wgmma_commit();
    }
    tile::wgmma_commit();
    tile::wgmma_wait<1>();
    pass_turn();  // the next warpgroup begins when the last step is about done
    tile::wgmma_wait<0>();
    tile::wgmma_pin(x);
    if (lane_ == 0) tile::mbarrier_arrive(&memory_.empty[ring_.slot]);
    ring_.advance();
  }

  // Pass 1.
  __device__ void normalise(const ScoreItem& item) {
    const int position = item.first + first_token();
    const auto visible = [&](int row) {
      const int length = position + row / Shape::kGroup + 1;
      return task_.fine_normaliser ? fine_windows(length) : coarse_windows(length);
    };
    RunningNormaliser row0;
    RunningNormaliser row1;
    for (int window = 0; window < item.norm_windows; window += kTileKeys) {
      float x[kTileValues];
      multiply(x);
      if (window + kTileKeys > visible(0)) {
        const int column = window + lane_ % 4 * 2;
        hide_columns<0>(x, column, visible(lane_ / 4));
        hide_columns<1>(x, column, visible(lane_ / 4 + 8));
      }
      row0.add<0>(x, task_.exponent);
      row1.add<1>(x, task_.exponent);
    }
    lse0_ = row0.finish(task_.exponent);
    lse1_ = row1.finish(task_.exponent);
  }

  // Pass 2.
  __device__ void score(const ScoreItem& item) {
    best_.clear();
    previous_.fill(0);
    for (int window = 0; window < item.score_windows; window += kTileKeys) {
      float x[kTileValues];
      multiply(x);
#pragma unroll
      for (int i = 0; i < kTileValues; ++i) {
        x[i] = tile::fast_exp2(fmaf(x[i], task_.exponent, i & 2 ? -lse1_ : -lse0_));
      }
      sum_groups<Shape::kGroup>(x, memory_.sums[warp_]);
      __syncwarp();
#pragma unroll 1
      for (int token = 0; token < Shape::kWarpTokens; ++token) pool(item, window, token);
      __syncwarp();
    }
  }

  // The best window of each of the tile's 32 blocks: the four that begin in it, and the one before
  // them, which reaches into it.
  __device__ void pool(const ScoreItem& item, int window, int token) {
    const int position = item.first + first_token() + token;
    const int block = window / kWindowsPerBlock + lane_;
    const float4 begin =
        *reinterpret_cast<const float4*>(&memory_.sums[warp_][token][kWindowsPerBlock * lane_]);
    const float carried = previous_.get(token);
    float before = __shfl_up_sync(kWarp, begin.w, 1);
    if (lane_ == 0) before = carried;
    previous_.set(token, __shfl_sync(kWarp, begin.w, 31));
    // Only the last window of the block before the own one can be out of sight.
    const float last = block * kWindowsPerBlock + 3 < fine_windows(position + 1) ? begin.w : 0;
    // fmaxf drops NaN, so a broken logit makes a bad score and not a broken order.
    const float score =
        fmaxf(fmaxf(fmaxf(begin.x, begin.y), fmaxf(begin.z, last)), fmaxf(before, 0));
    best_.offer(token, score, block, block >= item.sink && block < item.first_local, item.free);
  }

  // The selection of one token of the warp.
  __device__ void write(const ScoreItem& item, int token) {
    const int item_token = first_token() + token;
    const int position = item.first + item_token;
    if (position < item.begin || position >= item.end) return;
    if (item.scored()) best_.finish(token, item.free);
    const std::int64_t row =
        std::int64_t{item.head} * task_.batch.num_tokens + item.token + item_token;
    const int local = item.sink + item.free;
    for (int i = lane_; i < task_.columns; i += 32) {
      int block = -1;
      if (i < local) {
        block = i < item.sink || !item.scored() ? i : best_.chosen(token, i - item.sink);
      } else if (item.first_local + i - local <= item.own) {
        block = item.first_local + i - local;
      }
      task_.selection[row * task_.columns + i] = block;
    }
  }

  const ScoreMaps& maps_;
  const ScoreTask& task_;
  ScoreMemory<Shape>& memory_;
  const int warp_;
  const int lane_;
  tile::RingCursor<Shape::kStages> ring_;
  std::uint32_t queries_phase_ = 0;
  float lse0_ = 0;
  float lse1_ = 0;
  BestBlocks<typename Shape::Key, Shape::kWarpTokens> best_;
  PerToken<float, Shape::kWarpTokens> previous_;  // the last tile's last window
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    score_select_kernel(const __grid_constant__ ScoreMaps maps,
                        const __grid_constant__ ScoreTask task) {
  extern __shared__ __align__(1024) std::byte shared[];
  auto& memory = *reinterpret_cast<ScoreMemory<Shape>*>(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      tile::mbarrier_init(&memory.full[i], 1);
      tile::mbarrier_init(&memory.empty[i], Shape::kWarps);
    }
    for (int i = 0; i < Shape::kWarpgroups; ++i) tile::mbarrier_init(&memory.queries_full[i], 1);
    tile::fence_mbarrier_init();
  }
  __syncthreads();
  const int warp = tile::warp_index();
  if (warp >= Shape::kWarps) {
    if constexpr (Shape::kShiftsRegisters) tile::setmaxnreg_dec<Shape::kFeedRegisters>();
    if (threadIdx.x == 32 * Shape::kWarps) ScoreProducer<Shape>(maps, task, memory).run();
  } else {
    if constexpr (Shape::kShiftsRegisters) tile::setmaxnreg_inc<Shape::kComputeRegisters>();
    ScoreConsumer<Shape>(maps, task, memory, warp).run();
  }
}

}  // namespace infllm::cuda::sm90
