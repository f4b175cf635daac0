// SPDX-License-Identifier: Apache-2.0
//
// dQ on Hopper, token-major: the forward pass's tiles, lists and feeding warpgroup
// (attend_kernel.cuh). Each computing warpgroup owns 64 rows:
//
//   for each block that one of its tokens wants:
//     S = Q K^T   dP = dO V^T   dS = 2^(c S - LSE) (dP - Delta)   dQ += dS K
//
// Q and dO stay, K and V stream through the ring; K is needed to the end of a step, V until dP is
// there. Three warpgroups cover for each other: a thread's 160 registers are too few for products
// of two steps at once.
#pragma once

#include "infllm/backend/cuda/sm90/attend_backward_passes.h"
#include "infllm/backend/cuda/sm90/attend_feed.cuh"
#include "infllm/backend/cuda/sm90/attend_products.cuh"
#include "infllm/backend/cuda/sm90/attend_wishes.cuh"

namespace infllm::cuda::sm90 {

// Tiles as in the sparse forward pass, for dense sequences too.
template <typename T, int kHeadDim, bool kIsSparse, int kGroupSize>
struct QueryGradientConfig : AttendConfig<T, kHeadDim, true, kGroupSize> {
  using Base = AttendConfig<T, kHeadDim, true, kGroupSize>;
  static constexpr bool kSparse = kIsSparse;
  static constexpr bool kSingles = false;
  static constexpr int kStages =
      stages_in(kSharedLimit - 2 * Base::kGroups * Base::kTileBytes, 2 * Base::kStageBytes);
};

struct QueryGradientMaps {
  CUtensorMap q, grad_o;  // rows_map of a warpgroup's rows
  CUtensorMap k, v;
};

struct QueryGradientArgs {
  AttendArgs attend;  // o is dQ
  const RowStatistics* stats;
  float scale;
};

template <class C>
using QueryGradientShared = AttendShared<C, 2>;

// Wishes of a dense sequence: every block up to the tokens' own, if its page exists.
template <class C>
class AllBlocks {
 public:
  __device__ __forceinline__ AllBlocks(const AttendArgs& a, const Rows<C>& rows, int count, int)
      : args_(a), rows_(rows), entries_(rows.in_use() ? count : 0) {}

  __device__ __forceinline__ void load(int base) {
    const int block = base + static_cast<int>(threadIdx.x % 32);
    const Sequence sequence(args_.batch, rows_.tile.sequence);
    const bool there = block < entries_ && block <= rows_.own_block() &&
                       sequence.page(block, args_.pool.num_pages) >= 0;
    group = __ballot_sync(0xffffffff, there);
    own = __ballot_sync(0xffffffff, block == rows_.own_block());
  }

  unsigned group = 0;
  unsigned row[2] = {~0u, ~0u};
  unsigned own = 0;

 private:
  const AttendArgs& args_;
  const Rows<C>& rows_;
  int entries_;
};

template <class C>
__device__ __forceinline__ void store_queries(const QueryGradientArgs& args, const Rows<C>& rows,
                                              const float (&grad_q)[C::kDim / 2]) {
  const Tile& tile = rows.tile;
  const int heads_q = args.attend.heads << rows.group_log2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = tile.first_token + rows.token(i);
    std::uint32_t words[C::kDim / 8];
#pragma unroll
    for (int j = 0; j < C::kDim / 8; ++j) {
      words[j] = infllm::cuda::tile::pack2<typename C::Type>(
          grad_q[4 * j + 2 * i] * args.scale, grad_q[4 * j + 2 * i + 1] * args.scale);
    }
    const std::int64_t row = std::int64_t{token} * heads_q + rows.head(i);
    store_row<C>(static_cast<typename C::Type*>(args.attend.o) + row * C::kDim, words,
                 token >= tile.begin && token < tile.end);
  }
}

template <class C>
__device__ __forceinline__ void compute_queries(QueryGradientShared<C>& shared,
                                                const QueryGradientArgs& args, int group) {
  using namespace tile;
  using T = typename C::Type;
  using Wanted = std::conditional_t<C::kSparse, Wishes<C>, AllBlocks<C>>;
  const AttendArgs& a = args.attend;
  const bool leader = threadIdx.x % 32 == 0;
  Queries<C> queries(shared.rows[0][group]);
  Queries<C> gradients(shared.rows[1][group]);
  RingCursor<C::kStages> ring;
  for (unsigned n = 0;; ++n) {
    mbarrier_wait(&shared.work_full[n % 2], n / 2 & 1);
    const auto& work = shared.work[n % 2];
    const Tile& tile = work.tile;
    const int entries = work.entries;
    if (tile.index < 0) return;
    const Rows<C> rows(tile, a, group);
    Wanted wishes(a, rows, entries, work.singles);
    RowStatistics stats[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = tile.first_token + rows.token(i);
      stats[i] = {kInfinity, 0};  // weights of zero
      if (token >= tile.begin && token < tile.end) {
        stats[i] = args.stats[std::int64_t{token} * (a.heads << rows.group_log2) + rows.head(i)];
      }
    }
    float s[32], grad_p[32], grad_q[C::kDim / 2];
    std::uint32_t grad_s[16];
#pragma unroll
    for (int i = 0; i < C::kDim / 2; ++i) grad_q[i] = 0;

    // s becomes P, zeros in rows that do not want the block. False: no row of the warp does, and s
    // is not touched.
    const auto weigh_rows = [&](unsigned bit) {
      if (wishes.own & bit) mask_later(s, rows, rows.own_block());
      bool wanted[2];
      float lse[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        wanted[i] = (wishes.row[i] & bit) != 0;
        lse[i] = wanted[i] ? stats[i].lse : kInfinity;
      }
      const bool any = !C::kSparse || __any_sync(0xffffffff, wanted[0] || wanted[1]);
      if (any) {
#pragma unroll
        for (int i = 0; i < 32; ++i) s[i] = fast_exp2(fmaf(s[i], a.c, -lse[i / 2 % 2]));
      }
      return any;
    };
    const auto keep_gradients = [&](bool any) {  // dS
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float delta = stats[i % 2].delta;
        grad_s[i] = any ? pack2<T>(s[2 * i] * (grad_p[2 * i] - delta),
                                   s[2 * i + 1] * (grad_p[2 * i + 1] - delta))
                        : 0;
      }
    };
    const auto add_keys = [&](int slot) {
      const std::uint64_t k_desc = smem_desc_mn_major(shared.k[uniform(slot)]);
      wgmma_fence();
      add_product<C>(grad_q, grad_s, k_desc);
      wgmma_commit();
    };

    mbarrier_wait(&shared.rows_full[group], n & 1);
    for (int entry = 0; entry < entries; ++entry, ring.advance()) {
      if (entry % 32 == 0) wishes.load(entry);
      const unsigned bit = 1u << entry % 32;
      if ((wishes.group & bit) == 0) {
        if (leader) pass_block(shared, ring);
        __syncwarp();
        continue;
      }
      // Rows of the last page that nobody wrote must not meet a weight of zero.
      const int written = (wishes.own & bit) ? tile.length - rows.own_block() * kPageTokens : 64;
      mbarrier_wait(&shared.ring.k_full[ring.slot], ring.phase);
      if (written < kPageTokens) clear_tail<C>(shared.k[ring.slot], written, group);
      queries.multiply(s, shared.k[uniform(ring.slot)]);
      mbarrier_wait(&shared.ring.v_full[ring.slot], ring.phase);
      if (written < kPageTokens) clear_tail<C>(shared.v[ring.slot], written, group);
      gradients.multiply(grad_p, shared.v[uniform(ring.slot)]);
      wgmma_wait<1>();
      wgmma_pin(s);
      const bool any = weigh_rows(bit);
      wgmma_wait<0>();
      wgmma_pin(grad_p);
      if (leader) mbarrier_arrive(&shared.ring.v_empty[ring.slot]);
      keep_gradients(any);
      add_keys(ring.slot);
      // Not under a condition: the compiler would make every product wait for the one before.
      wgmma_wait<0>();
      wgmma_pin(grad_q);
      if (leader) mbarrier_arrive(&shared.ring.k_empty[ring.slot]);
    }
    __syncwarp();
    if (leader) mbarrier_arrive(&shared.rows_empty[group]);
    store_queries<C>(args, rows, grad_q);
    __syncwarp();
    if (leader) mbarrier_arrive(&shared.work_empty[n % 2]);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    query_gradient_kernel(const __grid_constant__ QueryGradientMaps maps,
                          const __grid_constant__ QueryGradientArgs args) {
  using namespace tile;
  extern __shared__ std::byte memory[];
  const int warp = warp_index();
  auto& shared = begin_shared<C, QueryGradientShared<C>>(memory);
  if (warp < 4) {
    setmaxnreg_dec<C::kFeedRegisters>();
    if (warp == 0) feed_blocks<C>(shared, args.attend, maps.k, maps.v);
    if (warp >= 1 && warp <= C::kGroups) {
      feed_rows<C>(shared, args.attend, warp - 1, maps.q, maps.grad_o);
    }
  } else {
    setmaxnreg_inc<C::kComputeRegisters>();
    compute_queries<C>(shared, args, warp / 4 - 1);
  }
}

}  // namespace infllm::cuda::sm90
