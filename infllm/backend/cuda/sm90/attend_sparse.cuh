// SPDX-License-Identifier: Apache-2.0
//
// Sparse attention on Hopper: the computing warpgroups.
//
// Every warpgroup walks the list of its tile and passes blocks that none of its own tokens chose.
// With G = 16 a warp's 16 rows are one token, so whether it chose a block is a warp-uniform bit;
// other groups look at a bit for each row. Only a token's own block needs a mask inside.
#pragma once

#include "infllm/backend/cuda/sm90/attend_rows.cuh"
#include "infllm/backend/cuda/sm90/attend_warp.cuh"

namespace infllm::cuda::sm90 {

// Who wants the next 32 blocks of the list.
template <class C>
struct Wishes {
  // Entry `base` + i is described by bit i of each word.
  __device__ __forceinline__ void load(const AttendArgs& a, const Rows<C>& rows, int entries,
                                       int singles, int base) {
    constexpr unsigned kAll = 0xffffffff;
    const int entry = base + static_cast<int>(threadIdx.x % 32);
    const bool listed = entry < entries && rows.in_use();
    const std::int64_t at = a.lists.place(rows.tile.index - a.first, entry, singles);
    typename C::TokenSet set = 0;
    int block = -1;
    if (listed) {
      set = static_cast<const typename C::TokenSet*>(a.lists.tokens)[at];
      block = a.lists.blocks[at];
    }
    group = __ballot_sync(kAll, (set & rows.group_set()) != 0);
    own = __ballot_sync(kAll, block == rows.own_block());
    if constexpr (C::kGroup == 16) {
      row[0] = __ballot_sync(kAll, set >> rows.warp_token() & 1);
      row[1] = row[0];
    } else {
      for (int i = 0; i < max(1, 16 >> rows.group_log2); ++i) {
        const int token = rows.warp_token() + i;
        const unsigned word = __ballot_sync(kAll, set >> token & 1);
        if (rows.token(0) == token) row[0] = word;
        if (rows.token(1) == token) row[1] = word;
      }
    }
  }

  unsigned group;   // some token of this warpgroup
  unsigned row[2];  // the tokens of this lane's rows
  unsigned own;     // it is the tokens' own block
};

// The products of the next wanted block are under way while the sum with this one's weights is
// made. The ring cannot move on while V is held, so a warpgroup finishes a block before it passes
// the last stage that may be filled meanwhile.
template <class C>
__device__ __forceinline__ void compute_sparse(AttendShared<C>& shared, const AttendArgs& a,
                                               int group) {
  using namespace tile;
  using T = typename C::Type;
  using Product = Wgmma<T, 64, Major::kK>;
  using Sum = Wgmma<T, C::kDim, Major::kMN>;
  const bool leader = threadIdx.x % 32 == 0;
  const int lane_column = static_cast<int>(threadIdx.x % 4) * 2;
  Queries<C> queries(shared.q[group]);
  RingCursor<C::kStages> ring;
  for (unsigned n = 0;; ++n) {
    mbarrier_wait(&shared.work_full[n % 2], n / 2 & 1);
    const auto& work = shared.work[n % 2];
    const Tile& tile = work.tile;
    const int entries = work.entries;
    if (tile.index < 0) return;
    const Rows<C> rows(tile, a, group);
    Wishes<C> wishes{};
    RowState state[2];
    float s[32];
    std::uint32_t p[16];
    float o[C::kDim / 2];
#pragma unroll
    for (int i = 0; i < C::kDim / 2; ++i) o[i] = 0;
    float factor[2];

    const auto multiply_keys = [&] {
      queries.template multiply<Product>(s, smem_desc_k_major(shared.k[ring.stage]), kPanelBytes);
    };
    const auto multiply_values = [&](int stage) {
      const std::uint64_t v_desc = smem_desc_mn_major(shared.v[stage]);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        Sum::rs(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                v_desc + step * kStepMnMajor, 1);
      }
      wgmma_commit();
    };
    bool any_wanted = false;  // by this warp
    const auto make_weights = [&](unsigned bit) {
      if (wishes.own & bit) {
        const int first = tile.position - rows.own_block() * kPageTokens;
        mask_beyond(s, {first + rows.token(0), first + rows.token(1)}, lane_column);
      }
      const bool wanted[2] = {(wishes.row[0] & bit) != 0, (wishes.row[1] & bit) != 0};
      any_wanted = __any_sync(0xffffffff, wanted[0] || wanted[1]);
      if (any_wanted) weigh(s, wanted, a.c, state, factor);
    };
    const auto keep_weights = [&] {
      if (any_wanted) {
        rescale(o, factor);
#pragma unroll
        for (int i = 0; i < 16; ++i) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
      } else {
#pragma unroll
        for (int i = 0; i < 16; ++i) p[i] = 0;
      }
    };
    bool own = false;  // the block whose weights are in p
    const auto prepare_values = [&](const RingCursor<C::kStages>& at) {
      mbarrier_wait(&shared.ring.v_full[at.stage], at.phase);
      if (!own) return;
      const int written = tile.length - rows.own_block() * kPageTokens;
      if (written < kPageTokens) clear_tail<C>(shared.v[at.stage], written, group);
    };

    mbarrier_wait(&shared.q_full, n & 1);
    const bool released = queries.hold(shared.q[group]);
    __syncwarp();
    if (released && leader) mbarrier_arrive(&shared.q_empty);
    const auto finish = [&](const RingCursor<C::kStages>& at) {
      prepare_values(at);
      multiply_values(at.stage);
      wgmma_wait<0>();
      wgmma_pin(o);
      if (leader) mbarrier_arrive(&shared.ring.v_empty[at.stage]);
    };
    int entry = 0;
    if constexpr (C::kSingles) {
      // Each warp walks the singles at its own pace.
      for (; entry < work.singles; ++entry, ring.advance()) {
        if (entry % 32 == 0) wishes.load(a, rows, entries, work.singles, entry);
        const bool mine = (wishes.row[0] >> entry % 32 & 1) != 0;
        if (mine || leader) mbarrier_wait(&shared.ring.k_full[ring.stage], ring.phase);
        if (mine) {
          warp_products<C>(s, shared.q[group], rows.first - group * 64, shared.k[ring.stage]);
          weigh(s, {true, true}, a.c, state, factor);
          rescale(o, factor);
#pragma unroll
          for (int i = 0; i < 16; ++i) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
        }
        __syncwarp();
        if (leader) mbarrier_arrive(&shared.ring.k_empty[ring.stage]);
        if (mine || leader) mbarrier_wait(&shared.ring.v_full[ring.stage], ring.phase);
        if (mine) warp_sum<C>(o, p, shared.v[ring.stage]);
        __syncwarp();
        if (leader) mbarrier_arrive(&shared.ring.v_empty[ring.stage]);
      }
    }
    RingCursor<C::kStages> before;
    int pending = -1;  // the entry whose weights are in p, at `before`
    for (;; ++entry) {
      if (entry % 32 == 0 && entry < entries) wishes.load(a, rows, entries, work.singles, entry);
      const unsigned bit = 1u << entry % 32;
      if (entry < entries && (wishes.group & bit) != 0) {
        mbarrier_wait(&shared.ring.k_full[ring.stage], ring.phase);
        multiply_keys();
        if (pending >= 0) {
          prepare_values(before);
          multiply_values(before.stage);
          wgmma_wait<1>();
          wgmma_pin(s);
          if (leader) mbarrier_arrive(&shared.ring.k_empty[ring.stage]);
          make_weights(bit);
          wgmma_wait<0>();
          wgmma_pin(o);
          if (leader) mbarrier_arrive(&shared.ring.v_empty[before.stage]);
        } else {
          wgmma_wait<0>();
          wgmma_pin(s);
          if (leader) mbarrier_arrive(&shared.ring.k_empty[ring.stage]);
          make_weights(bit);
        }
        keep_weights();
        own = (wishes.own & bit) != 0;
        pending = entry;
        before = ring;
      } else {
        if (pending >= 0 && (entry == entries || entry - pending >= C::kStages - 1)) {
          finish(before);
          pending = -1;
        }
        if (entry == entries) break;
        if (leader) {
          mbarrier_wait(&shared.ring.k_full[ring.stage], ring.phase);
          mbarrier_arrive(&shared.ring.k_empty[ring.stage]);
          mbarrier_wait(&shared.ring.v_full[ring.stage], ring.phase);
          mbarrier_arrive(&shared.ring.v_empty[ring.stage]);
        }
        __syncwarp();
      }
      ring.advance();
    }
    if (!released && leader) mbarrier_arrive(&shared.q_empty);
    store_tile<C>(a, rows, state, o);
    __syncwarp();
    if (leader) mbarrier_arrive(&shared.work_empty[n % 2]);
  }
}

}  // namespace infllm::cuda::sm90
