// SPDX-License-Identifier: Apache-2.0
//
// What the parts of Hopper's attend share: tile sizes, arguments, and the plan of shared memory.
#pragma once

#include "infllm/backend/cuda/sm90/tiles.cuh"
#include "infllm/backend/cuda/sm90/union.h"
#include "infllm/backend/cuda/tile/barrier.cuh"

namespace infllm::cuda::sm90 {

inline constexpr std::size_t kSharedLimit = 227 * 1024;
inline constexpr int kPanelBytes = 64 * 128;  // 64 rows of 64 elements

// Tile sizes. kGroup: query heads of a KV head if known when compiling, 0: any power of two up to
// 64. docs/kernels/hopper-attend.md keeps the runners-up with their times.
template <typename T, int kHeadDim, bool kIsSparse, int kWarpgroups, int kGroupSize, typename Set,
          int kHeldSteps>
struct AttendConfig {
  using Type = T;
  using TokenSet = Set;  // of a list's entry
  static constexpr int kDim = kHeadDim;
  static constexpr bool kSparse = kIsSparse;
  static constexpr int kGroups = kWarpgroups;  // that compute
  static constexpr int kGroup = kGroupSize;
  static constexpr bool kSingles = kSparse && kGroup == 16;  // a warp can serve its token alone
  static constexpr int kHeld = kHeldSteps;  // steps of 16 dimensions of q that stay in registers
  static constexpr int kBlocks = kSparse ? 1 : 2;  // of a step, and of a stage of the ring
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kRows = kGroups * 64;
  static constexpr int kPanels = kDim / 64;
  static constexpr int kTileBytes = 64 * kDim * 2;          // of a K or V block, or 64 query rows
  static constexpr int kStageBytes = kBlocks * kTileBytes;  // of K or of V
  static constexpr int kFit =
      static_cast<int>((kSharedLimit - 2048 - kGroups * kTileBytes) / (2 * kStageBytes));
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  // 64 K registers among all warpgroups; the feeding one gives up most of its own.
  static_assert(kGroups == 2 || kGroups == 3);
  static constexpr int kFeedRegisters = kGroups == 2 ? 40 : 32;
  static constexpr int kComputeRegisters = kGroups == 2 ? 232 : 160;
};

// Dense: 128 rows and 128 keys a step.
template <typename T, int kDim>
using DenseConfig = AttendConfig<T, kDim, false, 2, 0, std::uint16_t, kDim / 16>;
// Sparse, groups of 16: a warp is a token, 12 tokens a tile.
template <typename T, int kDim>
using TokenConfig = AttendConfig<T, kDim, true, 3, 16, std::uint16_t, 0>;
// Sparse, groups of 2 to 32: up to 64 tokens a tile.
template <typename T, int kDim>
using RowConfig = AttendConfig<T, kDim, true, 2, 0, unsigned long long, kDim / 16>;

struct AttendArgs {
  Batch batch;
  PagePool pool;
  UnionLists lists;
  void* o;
  float* lse;
  float c;  // scale log2(e)
  std::int32_t heads;
  std::int32_t group_log2;
  std::int32_t tile_tokens;
  std::int32_t first;  // tiles first .. first + count - 1; lists[0] is tile `first`
  std::int32_t count;
  unsigned* next;  // how many of them are taken
};

template <class C>
struct __align__(1024) AttendShared {
  struct Ring {
    std::uint64_t k_full[C::kStages], k_empty[C::kStages];
    std::uint64_t v_full[C::kStages], v_empty[C::kStages];
  };
  alignas(1024) std::byte q[C::kGroups][C::kTileBytes];
  alignas(1024) std::byte k[C::kStages][C::kStageBytes];
  alignas(1024) std::byte v[C::kStages][C::kStageBytes];
  Ring ring;
  std::uint64_t q_full, q_empty;
  std::uint64_t work_full[2], work_empty[2];
  struct Work {
    Tile tile;
    std::int32_t entries;
    std::int32_t singles;  // union.h; the first of the entries
  } work[2];
};

// A place in the ring, and the parity that its "full" barriers will complete with.
template <int kStages>
struct RingCursor {
  int stage = 0;
  std::uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace infllm::cuda::sm90
