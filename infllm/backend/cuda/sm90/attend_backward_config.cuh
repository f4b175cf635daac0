// SPDX-License-Identifier: Apache-2.0
//
// What the two kernels share that make dK and dV on Hopper: that of sparse batches
// (attend_backward_keys.cuh), and that of dense ones, which makes dQ too
// (attend_backward_dense.cuh). A thread block holds K and V of some blocks of 64 keys and walks
// tokens, the last one first, in stages of 64 rows (token, head of the group).
#pragma once

#include "infllm/backend/cuda/sm90/attend_backward_passes.h"
#include "infllm/backend/cuda/sm90/attend_products.cuh"
#include "infllm/backend/cuda/sm90/attend_rows.cuh"

namespace infllm::cuda::sm90 {

template <typename T, int kHeadDim, bool kIsListed>
struct KeyConfig {
  using Type = T;
  static constexpr int kDim = kHeadDim;
  static constexpr bool kListed = kIsListed;
  static constexpr int kBlocks = kListed ? 1 : 2;  // of 64 keys, of a thread block
  static constexpr int kPanels = kDim / 64;
  static constexpr bool kHalves = kListed && kPanels == 1;  // two warps share the rows of a panel
  static constexpr int kTileBytes = 64 * kDim * 2;
  // dS of a stage on its way to dQ, and how many of them there is room for.
  static constexpr int kGradBytes = 2 * kPanelBytes;
  static constexpr int kGrads = kListed ? 0 : 2;
  // A stage's Q and dO, and what its rows are.
  static constexpr int kStages = stages_in(
      kSharedLimit - kBlocks * 2 * kTileBytes - kGrads * kGradBytes, 2 * kTileBytes + 1024);
  static constexpr int kThreads = 3 * 128;
  static constexpr int kComputeRegisters = 240;
  static constexpr int kFeedRegisters = 24;
  static constexpr int kSums = kDim / 2;  // of a thread, for each of dK and dV
  static constexpr int kSumFloats = 64 * kDim;
};

struct KeyArgs {
  Batch batch;
  PagePool pool;
  const RowStatistics* stats;
  void* grad_k;
  void* grad_v;
  float* sums;
  float scale;
  float c;  // exponent_of(scale)
  std::int32_t heads;
  std::int32_t group_log2;
};

// What a thread block does: `count` tokens for a block of keys, or for two of them.
struct KeyItem {
  std::int32_t head;
  std::int32_t sequence;
  std::int32_t block;  // the first, if two
  std::int32_t count = 0;
  bool exists = false;
};

__device__ __forceinline__ int count_stages(const KeyArgs& a, const KeyItem& item) {
  const int tokens = 64 >> a.group_log2;
  return (item.count + tokens - 1) / tokens;
}

template <class C>
struct __align__(1024) KeyShared {
  alignas(1024) std::byte k[C::kBlocks][C::kTileBytes];
  alignas(1024) std::byte v[C::kBlocks][C::kTileBytes];
  alignas(1024) std::byte q[C::kStages][C::kTileBytes];
  alignas(1024) std::byte grad_o[C::kStages][C::kTileBytes];
  struct Rows {
    RowStatistics stats[64];
    std::int32_t position[64];  // of each token
  };
  alignas(16) Rows rows[C::kStages];
  std::uint64_t blocks_full;
  std::uint64_t full[C::kStages], empty[C::kStages];
};

template <class C>
__device__ __forceinline__ void init_barriers(KeyShared<C>& shared) {
  using namespace tile;
  mbarrier_init(&shared.blocks_full, 1);
  for (int i = 0; i < C::kStages; ++i) {
    // A lane of each warp that feeds, and all lanes of the one that brings statistics when these
    // have arrived.
    mbarrier_init(&shared.full[i], (C::kListed ? 4 : 2) + 32);
    mbarrier_init(&shared.empty[i], C::kListed ? 4 : 8);
  }
}

}  // namespace infllm::cuda::sm90
