// SPDX-License-Identifier: Apache-2.0
//
// Sparse attention on Hopper: the computing warpgroups.
//
// Every warpgroup walks the list of its tile and passes blocks that none of its own tokens chose.
// With G = 16 a warp's 16 rows are one token, so whether it chose a block is a warp-uniform bit;
// other groups look at a bit for each row. Only a token's own block needs a mask inside.
#pragma once

#include "infllm/backend/cuda/sm90/attend_products.cuh"
#include "infllm/backend/cuda/sm90/attend_warp.cuh"
#include "infllm/backend/cuda/sm90/attend_wishes.cuh"

namespace infllm::cuda::sm90 {

// Singles come first, and no step of the warpgroup is under way then. After them the products of
// the next wanted block are under way while the sum with this one's weights is made. The ring
// cannot move on while V is held, so a warpgroup finishes a block before it passes the last stage
// that may be filled meanwhile.
template <class C>
__device__ __forceinline__ void compute_sparse(AttendShared<C>& shared, const AttendArgs& a,
                                               int group) {
  using namespace tile;
  using T = typename C::Type;
  const bool leader = threadIdx.x % 32 == 0;
  Queries<C> queries(shared.rows[0][group]);
  RingCursor<C::kStages> ring;
  for (unsigned n = 0;; ++n) {
    mbarrier_wait(&shared.work_full[n % 2], n / 2 & 1);
    const auto& work = shared.work[n % 2];
    const Tile& tile = work.tile;
    const int entries = work.entries;
    if (tile.index < 0) return;
    const Rows<C> rows(tile, a, group);
    Wishes<C> wishes(a, rows, entries, work.singles);
    RowState state[2];
    float s[32];
    std::uint32_t p[16];
    float o[C::kDim / 2];
#pragma unroll
    for (int i = 0; i < C::kDim / 2; ++i) o[i] = 0;
    float factor[2];

    const auto multiply_values = [&](int slot) {
      const std::uint64_t v_desc = smem_desc_mn_major(shared.v[uniform(slot)]);
      wgmma_fence();
      add_product<C>(o, p, v_desc);
      wgmma_commit();
    };
    bool any_wanted = false;  // by this warp
    const auto make_weights = [&](unsigned bit) {
      if (wishes.own & bit) mask_later(s, rows, rows.own_block());
      const bool wanted[2] = {(wishes.row[0] & bit) != 0, (wishes.row[1] & bit) != 0};
      any_wanted = __any_sync(0xffffffff, wanted[0] || wanted[1]);
      if (any_wanted) weigh(s, wanted, a.c, state, factor);
    };
    const auto keep_weights = [&] {
      if (any_wanted) rescale(o, factor);
#pragma unroll
      for (int i = 0; i < 16; ++i) p[i] = any_wanted ? pack2<T>(s[2 * i], s[2 * i + 1]) : 0;
    };
    bool own = false;  // the block whose weights are in p
    const auto prepare_values = [&](const RingCursor<C::kStages>& at) {
      mbarrier_wait(&shared.ring.v_full[at.slot], at.phase);
      if (!own) return;
      const int written = tile.length - rows.own_block() * kPageTokens;
      if (written < kPageTokens) clear_tail<C>(shared.v[at.slot], written, group);
    };

    mbarrier_wait(&shared.rows_full[group], n & 1);
    const auto finish = [&](const RingCursor<C::kStages>& at) {
      prepare_values(at);
      multiply_values(at.slot);
      wgmma_wait<0>();
      wgmma_pin(o);
      if (leader) mbarrier_arrive(&shared.ring.v_empty[at.slot]);
    };
    // A single (union.h): the warp that wants it computes it, the others go ahead.
    const auto serve_single = [&](unsigned bit) {
      const bool wanted[2] = {(wishes.row[0] & bit) != 0, (wishes.row[1] & bit) != 0};
      const bool mine = __any_sync(0xffffffff, wanted[0] || wanted[1]);
      if (mine || leader) mbarrier_wait(&shared.ring.k_full[ring.slot], ring.phase);
      if (mine) {
        warp_products<C>(s, shared.rows[0][group], rows.first - group * 64, shared.k[ring.slot]);
        weigh(s, wanted, a.c, state, factor);
        rescale(o, factor);
        pack<T>(p, s);
      }
      __syncwarp();
      if (leader) mbarrier_arrive(&shared.ring.k_empty[ring.slot]);
      if (mine || leader) mbarrier_wait(&shared.ring.v_full[ring.slot], ring.phase);
      if (mine) warp_sum<C>(o, p, shared.v[ring.slot]);
      __syncwarp();
      if (leader) mbarrier_arrive(&shared.ring.v_empty[ring.slot]);
    };
    RingCursor<C::kStages> before;
    int pending = -1;  // the entry whose weights are in p, at `before`
    for (int entry = 0;; ++entry) {
      if (entry % 32 == 0 && entry < entries) wishes.load(entry);
      const unsigned bit = 1u << entry % 32;
      const bool wanted = entry < entries && (wishes.group & bit) != 0;
      if (wanted && entry >= work.singles) {
        mbarrier_wait(&shared.ring.k_full[ring.slot], ring.phase);
        queries.multiply(s, shared.k[uniform(ring.slot)]);
        if (pending >= 0) {
          prepare_values(before);
          multiply_values(before.slot);
          wgmma_wait<1>();
          wgmma_pin(s);
          if (leader) mbarrier_arrive(&shared.ring.k_empty[ring.slot]);
          make_weights(bit);
          wgmma_wait<0>();
          wgmma_pin(o);
          if (leader) mbarrier_arrive(&shared.ring.v_empty[before.slot]);
        } else {
          wgmma_wait<0>();
          wgmma_pin(s);
          if (leader) mbarrier_arrive(&shared.ring.k_empty[ring.slot]);
          make_weights(bit);
        }
        keep_weights();
        own = (wishes.own & bit) != 0;
        pending = entry;
        before = ring;
      } else {
        const bool last = entry == entries;
        if (last && leader) mbarrier_arrive(&shared.rows_empty[group]);
        if (pending >= 0 && (last || entry - pending >= C::kStages - 1)) {
          finish(before);
          pending = -1;
        }
        if (last) break;
        if (wanted) {
          serve_single(bit);
        } else if (leader) {
          pass_block(shared, ring);
        }
        __syncwarp();
      }
      ring.advance();
    }
    store_tile<C>(a, rows, state, o);
    __syncwarp();
    if (leader) mbarrier_arrive(&shared.work_empty[n % 2]);
  }
}

}  // namespace infllm::cuda::sm90
