// SPDX-License-Identifier: Apache-2.0
//
// Dense attention on Hopper: the computing warpgroups.
#pragma once

#include "infllm/backend/cuda/sm90/attend_products.cuh"
#include "infllm/backend/cuda/sm90/attend_rows.cuh"

namespace infllm::cuda::sm90 {

// Dense attention in steps of two blocks. The products of the next step are under way while this
// one's weights are made, and the two warpgroups take turns at the tensor cores: one multiplies
// while the other computes exponentials.
template <class C>
__device__ __forceinline__ void compute_dense(AttendShared<C>& shared, const AttendArgs& a,
                                              int group) {
  using namespace tile;
  static_assert(C::kGroups == 2);
  using T = typename C::Type;
  const bool leader = threadIdx.x % 32 == 0;
  Queries<C> queries(shared.rows[0][group]);
  const auto wait_turn = [&] { named_barrier_sync(4 + group, 256); };
  const auto pass_turn = [&] { named_barrier_arrive(5 - group, 256); };
  if (group == 1) pass_turn();
  RingCursor<C::kStages> ring;
  for (unsigned n = 0;; ++n) {
    mbarrier_wait(&shared.work_full[n % 2], n / 2 & 1);
    const auto& work = shared.work[n % 2];
    const Tile& tile = work.tile;
    const int entries = work.entries;
    if (tile.index < 0) return;
    const Rows<C> rows(tile, a, group);
    const int steps = (entries + 1) / 2;
    RowState state[2];
    float s[64];
    std::uint32_t p[32];
    float o[C::kDim / 2];
#pragma unroll
    for (int i = 0; i < C::kDim / 2; ++i) o[i] = 0;
    float factor[2];
    constexpr bool kWanted[2] = {true, true};

    const auto multiply_keys = [&](int slot) { queries.multiply(s, shared.k[uniform(slot)]); };
    const auto multiply_values = [&](int slot) {
      const std::uint64_t v_desc = smem_desc_mn_major(shared.v[uniform(slot)]);
      wgmma_fence();
      add_product<C>(o, p, v_desc);
      wgmma_commit();
    };
    const Sequence sequence(a.batch, tile.sequence);
    unsigned present = 0;  // bit i: block 32 n + i has a page, or lies behind the end
    const auto mask = [&](int step) {
      if (step % 16 == 0) {
        const int block = 2 * step + static_cast<int>(threadIdx.x % 32);
        present = __ballot_sync(0xffffffff,
                                block >= entries || sequence.page(block, a.pool.num_pages) >= 0);
      }
      if (step == steps - 1) mask_later(s, rows, 2 * step);
      const unsigned both = present >> step % 16 * 2 & 3;
      if (both != 3) {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
          if ((both >> i / 32 & 1) == 0) s[i] = -kInfinity;
        }
      }
    };

    mbarrier_wait(&shared.rows_full[group], n & 1);
    queries.hold(shared.rows[0][group]);
    __syncwarp();
    if (leader) mbarrier_arrive(&shared.rows_empty[group]);
    mbarrier_wait(&shared.ring.k_full[ring.slot], ring.phase);
    wait_turn();
    multiply_keys(ring.slot);
    pass_turn();
    wgmma_wait<0>();
    wgmma_pin(s);
    if (leader) mbarrier_arrive(&shared.ring.k_empty[ring.slot]);
    mask(0);
    weigh(s, kWanted, a.c, state, factor);
    pack<T>(p, s);
    auto before = ring;
    for (int step = 1; step < steps; ++step) {
      ring.advance();
      mbarrier_wait(&shared.ring.k_full[ring.slot], ring.phase);
      wait_turn();
      multiply_keys(ring.slot);
      mbarrier_wait(&shared.ring.v_full[before.slot], before.phase);
      multiply_values(before.slot);
      pass_turn();
      wgmma_wait<1>();
      wgmma_pin(s);
      if (leader) mbarrier_arrive(&shared.ring.k_empty[ring.slot]);
      mask(step);
      weigh(s, kWanted, a.c, state, factor);
      wgmma_wait<0>();
      wgmma_pin(o);
      if (leader) mbarrier_arrive(&shared.ring.v_empty[before.slot]);
      rescale(o, factor);
      pack<T>(p, s);
      before = ring;
    }
    mbarrier_wait(&shared.ring.v_full[ring.slot], ring.phase);
    const int written = tile.length - (entries - 1) * kPageTokens;
    if (written < kPageTokens) {
      clear_tail<C>(shared.v[ring.slot] + (entries - 1) % 2 * C::kTileBytes, written, group);
    }
    multiply_values(ring.slot);
    wgmma_wait<0>();
    wgmma_pin(o);
    if (leader) mbarrier_arrive(&shared.ring.v_empty[ring.slot]);
    ring.advance();
    store_tile<C>(a, rows, state, o);
    __syncwarp();
    if (leader) mbarrier_arrive(&shared.work_empty[n % 2]);
  }
}

}  // namespace infllm::cuda::sm90
