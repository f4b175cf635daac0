// SPDX-License-Identifier: Apache-2.0
//
// What the parts of Hopper's attend share: tile sizes, arguments, and the plan of shared memory.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "infllm/backend/cuda/sm90/shared_memory.cuh"
#include "infllm/backend/cuda/sm90/tiles.cuh"
#include "infllm/backend/cuda/sm90/union.h"
#include "infllm/backend/cuda/tile/ring.cuh"

namespace infllm::cuda::sm90 {

using tile::RingCursor;

// Stages of a ring that find room, at most 8, beside barriers, what a tile is, and alignment.
constexpr int stages_in(int bytes, int stage_bytes) {
  const int fit = (bytes - 2048) / stage_bytes;
  return fit < 8 ? fit : 8;
}

// Tile sizes; docs/kernels/hopper-attend.md keeps the runners-up with their times. kGroup: query
// heads of a KV head if known when compiling, 0: any power of two up to 64.
template <typename T, int kHeadDim, bool kIsSparse, int kGroupSize>
struct AttendConfig {
  using Type = T;
  // The tokens of a tile that want a block: 12 tokens of a group of 16, 48 of a group of 4.
  using TokenSet = std::conditional_t<kGroupSize == 16, std::uint16_t, unsigned long long>;
  static constexpr int kDim = kHeadDim;
  static constexpr bool kSparse = kIsSparse;
  static constexpr int kGroup = kGroupSize;
  static constexpr int kGroups = kSparse ? 3 : 2;  // warpgroups that compute, 64 rows each
  static constexpr int kBlocks = kSparse ? 1 : 2;  // of a step, and of a stage of the ring
  static constexpr bool kHoldQueries = !kSparse;   // in registers
  static constexpr bool kSingles = kSparse;  // blocks that a warp computes by itself (union.h)
  // 64 K registers among all warpgroups; the feeding one gives up most of its own.
  static constexpr int kComputeRegisters = kSparse ? 160 : 232;
  static constexpr int kFeedRegisters = kSparse ? 32 : 40;
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kRows = kGroups * 64;
  static constexpr int kPanels = kDim / 64;
  static constexpr int kTileBytes = 64 * kDim * 2;          // of a K or V block, or 64 query rows
  static constexpr int kStageBytes = kBlocks * kTileBytes;  // of K or of V
  static constexpr int kStages = stages_in(kSharedLimit - kGroups * kTileBytes, 2 * kStageBytes);
};

template <typename T, int kDim>
using DenseConfig = AttendConfig<T, kDim, false, 0>;
// Groups of 16: a warp is a token.
template <typename T, int kDim>
using TokenConfig = AttendConfig<T, kDim, true, 16>;
// Groups of 4 to 32.
template <typename T, int kDim>
using RowConfig = AttendConfig<T, kDim, true, 0>;

struct AttendMaps {
  CUtensorMap q;  // rows_map of a warpgroup's rows
  CUtensorMap k, v;
};

struct AttendArgs {
  Batch batch;
  PagePool pool;
  UnionLists lists;
  void* o;
  float* lse;
  float c;  // exponent_of(scale)
  std::int32_t heads;
  std::int32_t group_log2;
  std::int32_t tile_tokens;
  std::int32_t first;  // tiles first .. first + count - 1; lists[0] is tile `first`
  std::int32_t count;
  unsigned* next;  // how many of them are taken
};

// The backward pass has two arrays of rows: those of Q and those of dO.
template <class C, int kArrays = 1>
struct __align__(1024) AttendShared {
  struct Ring {
    std::uint64_t k_full[C::kStages], k_empty[C::kStages];
    std::uint64_t v_full[C::kStages], v_empty[C::kStages];
  };
  alignas(1024) std::byte rows[kArrays][C::kGroups][C::kTileBytes];
  alignas(1024) std::byte k[C::kStages][C::kStageBytes];
  alignas(1024) std::byte v[C::kStages][C::kStageBytes];
  Ring ring;
  std::uint64_t rows_full[C::kGroups], rows_empty[C::kGroups];
  std::uint64_t work_full[2], work_empty[2];
  struct Work {
    Tile tile;
    std::int32_t entries;
    std::int32_t singles;  // union.h; the first of the entries
  } work[2];
};

// The shared memory of the kernel, aligned for the copy engine, with its barriers ready.
template <class C, class Shared>
__device__ __forceinline__ Shared& begin_shared(std::byte* memory) {
  using namespace tile;
  auto& shared = *reinterpret_cast<Shared*>(memory + bytes_to_skip(memory));
  if (threadIdx.x == 0) {
    constexpr int kWarps = C::kGroups * 4;
    for (int i = 0; i < C::kStages; ++i) {
      mbarrier_init(&shared.ring.k_full[i], 1);
      mbarrier_init(&shared.ring.v_full[i], 1);
      mbarrier_init(&shared.ring.k_empty[i], kWarps);
      mbarrier_init(&shared.ring.v_empty[i], kWarps);
    }
    for (int i = 0; i < C::kGroups; ++i) {
      mbarrier_init(&shared.rows_full[i], 1);
      mbarrier_init(&shared.rows_empty[i], 4);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&shared.work_full[i], 1);
      mbarrier_init(&shared.work_empty[i], kWarps + C::kGroups);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  return shared;
}

}  // namespace infllm::cuda::sm90
