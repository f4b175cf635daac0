// SPDX-License-Identifier: Apache-2.0
//
// The feeding warpgroup of Hopper's attend: one warp streams the K and V blocks of a tile's list
// through the ring, the others fetch query rows.
#pragma once

#include "infllm/backend/cuda/sm90/attend_config.cuh"
#include "infllm/backend/cuda/tile/tma.cuh"

namespace infllm::cuda::sm90 {

// Warp 0 of the feeding warpgroup: takes tiles, tells everybody, loads their K and V blocks.
template <class C, class Shared>
__device__ __forceinline__ void feed_blocks(Shared& shared, const AttendArgs& a,
                                            const CUtensorMap& k_map, const CUtensorMap& v_map) {
  using namespace tile;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int tiles = count_tiles(a.batch, a.tile_tokens, C::kSparse);
  RingCursor<C::kStages> ring;
  for (unsigned n = 0;; ++n) {
    unsigned taken = 0;
    if (lane == 0) taken = atomicAdd(a.next, 1u);
    taken = __shfl_sync(0xffffffff, taken, 0);
    Tile tile;
    if (taken < static_cast<unsigned>(a.count)) {
      tile = find_tile(a.batch, a.tile_tokens, C::kSparse, tiles, a.heads,
                       a.first + static_cast<int>(taken));
    }
    int entries = 0;
    if (tile.index >= 0) {
      entries = C::kSparse ? a.lists.counts[tile.index - a.first] : tile.blocks(a.tile_tokens);
    }
    int singles = 0;
    if (C::kSparse && tile.index >= 0) singles = a.lists.singles[tile.index - a.first];
    auto& work = shared.work[n % 2];
    mbarrier_wait(&shared.work_empty[n % 2], (n / 2 & 1) ^ 1);
    if (lane == 0) {
      work.tile = tile;
      work.entries = entries;
      work.singles = singles;
      mbarrier_arrive(&shared.work_full[n % 2]);
    }
    __syncwarp();
    if (tile.index < 0) return;
    const Sequence sequence(a.batch, tile.sequence);
    for (int base = 0; base < entries; base += 32) {
      int page = -1;
      if (base + lane < entries) {
        int block = base + lane;
        if (C::kSparse) block = a.lists.blocks[a.lists.place(tile.index - a.first, block, singles)];
        page = sequence.page(block, a.pool.num_pages);
      }
      const int some = min(32, entries - base);
      for (int i = 0; i < some; i += C::kBlocks) {
        // A page that does not exist, and the other half of a last step, read as zeros.
        int from[C::kBlocks];
        for (int j = 0; j < C::kBlocks; ++j) {
          from[j] = __shfl_sync(0xffffffff, page, i + j);
          if (from[j] < 0) from[j] = a.pool.num_pages;
        }
        std::uint64_t* full = &shared.ring.k_full[ring.slot];
        std::byte* to = shared.k[ring.slot];
        mbarrier_wait(&shared.ring.k_empty[ring.slot], ring.phase ^ 1);
        if (lane == 0) {
          mbarrier_arrive_expect_tx(full, C::kStageBytes);
          if constexpr (C::kBlocks == 1) {
            tma_load_5d(&k_map, full, to, 0, 0, 0, tile.head, from[0]);
          } else {
            // Panel by panel, so that the keys of all blocks are rows of one operand.
            for (int panel = 0; panel < C::kPanels; ++panel) {
              for (int j = 0; j < C::kBlocks; ++j, to += kPanelBytes) {
                tma_load_5d(&k_map, full, to, 0, 0, panel, tile.head, from[j]);
              }
            }
          }
        }
        full = &shared.ring.v_full[ring.slot];
        to = shared.v[ring.slot];
        mbarrier_wait(&shared.ring.v_empty[ring.slot], ring.phase ^ 1);
        if (lane == 0) {
          mbarrier_arrive_expect_tx(full, C::kStageBytes);
          for (int j = 0; j < C::kBlocks; ++j, to += C::kTileBytes) {
            tma_load_5d(&v_map, full, to, 0, 0, 0, tile.head, from[j]);
          }
        }
        __syncwarp();
        ring.advance();
      }
    }
  }
}

// A further warp for each computing warpgroup: its rows of each tile, from an array for each of the
// maps. Rows of other sequences' tokens may come along; nobody stores what becomes of them.
template <class C, class Shared, class... Map>
__device__ __forceinline__ void feed_rows(Shared& shared, const AttendArgs& a, int group,
                                          const Map&... maps) {
  using namespace tile;
  const bool leader = threadIdx.x % 32 == 0;
  for (unsigned n = 0;; ++n) {
    mbarrier_wait(&shared.work_full[n % 2], n / 2 & 1);
    const Tile tile = shared.work[n % 2].tile;
    __syncwarp();
    if (leader) mbarrier_arrive(&shared.work_empty[n % 2]);
    if (tile.index < 0) return;
    mbarrier_wait(&shared.rows_empty[group], (n & 1) ^ 1);
    if (leader) {
      std::uint64_t* full = &shared.rows_full[group];
      const int head = tile.head << a.group_log2;
      const int token = tile.first_token + (group * 64 >> a.group_log2);
      mbarrier_arrive_expect_tx(full, sizeof...(maps) * C::kTileBytes);
      int array = 0;
      (tma_load_4d(&maps, full, shared.rows[array++][group], 0, head, token, 0,
                   CacheHint::kEvictFirst),
       ...);
    }
    __syncwarp();
  }
}

}  // namespace infllm::cuda::sm90
