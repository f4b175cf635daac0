// SPDX-License-Identifier: Apache-2.0
//
// How dK and dV of blocks of 64 keys are added up, stage after stage of 64 rows:
//
//   S^T = K Q^T   dP^T = V dO^T   P^T = 2^(c S^T - LSE)   dS^T = P^T (dP^T - Delta)
//   dV += P^T dO  dK += dS^T Q
//
// The products are turned round so that weights go from accumulators into the second products as
// their left operands. A stage's rows are fetched by TMA, one box for each token and 64 dimensions,
// or one for all tokens where they are neighbours. Two warpgroups compute: in a sparse pass each
// takes every other stage of one block; in a dense pass both take every stage, one block each.
#pragma once

#include <climits>

#include "infllm/backend/cuda/backward/keys.cuh"
#include "infllm/backend/cuda/sm90/attend_backward_config.cuh"

namespace infllm::cuda::sm90 {

// Arrives when the copies that this thread began by cp.async are there.
__device__ __forceinline__ void arrive_after_copies(std::uint64_t* barrier) {
  asm volatile(
      "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(tile::shared_address(barrier))
      : "memory");
}

// A warp that feeds. In a sparse pass there are four of them, each of which brings half of Q (warps
// 0, 1) or of dO (2, 3): 64 dimensions of 128, or half of the tokens; in a dense pass warp 0 brings
// Q, and warp 2 dO. Warp 0 also brings the blocks themselves and the rows' statistics. token_at(i)
// is token i of the item; a lane holds a token of the stage, and asks for its box.
template <class C, class TokenAt>
__device__ __forceinline__ void feed_rows(KeyShared<C>& shared, const KeyArgs& a,
                                          const KeyItem& item, const CUtensorMap& token_map,
                                          const CUtensorMap& stage_map, const CUtensorMap& k_map,
                                          const CUtensorMap& v_map, int warp, TokenAt&& token_at) {
  using namespace tile;
  constexpr unsigned kAll = 0xffffffff;
  const int lane = static_cast<int>(threadIdx.x % 32);
  constexpr int kPanels = C::kListed ? 1 : C::kPanels;  // of a warp
  const int tokens = 64 >> a.group_log2;                // of a stage
  // Of which this warp brings tokens begin .. begin + share - 1.
  const int share = C::kHalves ? max(1, tokens / 2) : tokens;
  const int begin = C::kHalves ? warp % 2 * share : 0;
  const bool brings = lane >= begin && lane < min(begin + share, tokens);
  const unsigned bytes = __popc(__ballot_sync(kAll, brings)) * kPanels * (128u << a.group_log2);
  const int stages = (item.count + tokens - 1) / tokens;
  const Sequence sequence(a.batch, item.sequence);
  const int first_position = sequence.first_position() - sequence.first_token;  // of token 0
  const int heads_q = a.heads << a.group_log2;
  const int head = uniform(item.head << a.group_log2);
  if (warp == 0 && lane == 0 && stages > 0) {
    mbarrier_arrive_expect_tx(&shared.blocks_full, 2 * C::kBlocks * C::kTileBytes);
    for (int i = 0; i < C::kBlocks; ++i) {
      int page = sequence.page(item.block + i, a.pool.num_pages);
      if (page < 0) page = a.pool.num_pages;  // reads zeros
      tma_load_5d(&k_map, &shared.blocks_full, shared.k[i], 0, 0, 0, item.head, page);
      tma_load_5d(&v_map, &shared.blocks_full, shared.v[i], 0, 0, 0, item.head, page);
    }
  }
  __syncwarp();
  // The list, 32 tokens at a time, which are those of several stages.
  const auto load_tokens = [&](int batch) {
    const int i = item.count - (batch + 1) * 32 + lane;
    return i < 0 ? -1 : token_at(i);
  };
  int batch = load_tokens(0);
  int next_batch = load_tokens(1);
  int used = 0;  // of the batch, from its end
  RingCursor<C::kStages> ring;
  for (int stage = 0; stage < stages; ++stage, ring.advance()) {
    used += tokens;
    const int found = __shfl_sync(kAll, batch, 32 - used + lane);
    const int token = lane < tokens ? found : -1;
    const int first = __shfl_sync(kAll, token, begin);
    const bool together =
        first >= 0 && __all_sync(kAll, !brings || token == first + lane - begin) != 0;
    std::uint64_t* full = &shared.full[ring.slot];
    mbarrier_wait(&shared.empty[ring.slot], ring.phase ^ 1);
    if (warp == 0) {
      auto& rows = shared.rows[ring.slot];
      if (lane < tokens) rows.position[lane] = token < 0 ? -1 : token + first_position;
      // Of rows 2 lane and 2 lane + 1.
      const int owner = __shfl_sync(kAll, token, 2 * lane >> a.group_log2);
      RowStatistics* stats = rows.stats + 2 * lane;
      if (owner >= 0) {
        cp_async_16(
            stats,
            a.stats + std::int64_t{owner} * heads_q + head + (2 * lane & ((1 << a.group_log2) - 1)),
            true);
      } else {
        stats[0] = stats[1] = {kInfinity, 0};  // weights of zero
      }
      arrive_after_copies(full);
      __syncwarp();  // what lanes wrote is there when the first one arrives
    }
    std::byte* to = (warp < 2 ? shared.q : shared.grad_o)[ring.slot];
    if (lane == 0) mbarrier_arrive_expect_tx(full, bytes);
    const int from = C::kHalves ? 0 : warp % 2;
    for (int panel = from; panel < from + kPanels; ++panel) {
      std::byte* rows = to + panel * kPanelBytes + (lane << a.group_log2) * 128;
      if (together) {
        if (lane == begin) tma_load_4d(&stage_map, full, rows, 0, head, first, panel);
      } else if (brings) {
        const int owner = token < 0 ? a.batch.num_tokens : token;  // reads zeros
        tma_load_4d(&token_map, full, rows, 0, head, owner, panel);
      }
    }
    __syncwarp();
    if (used == 32) {
      used = 0;
      batch = next_batch;
      // Here and not earlier: who copies it waits for it.
      asm volatile("" : "+r"(batch));
      next_batch = load_tokens((stage + 1) * tokens / 32 + 1);
    }
  }
}

// A computing warpgroup adds up an item's stages. Meanwhile `use` may make something of dS:
//   publish(stage, dS^T)       when it is there
//   multiply(stage, product)   starts a product, before the sums, in registers that are free
//   finish(stage, product)     awaits it, while the sums are under way
// Blocks that are not `present` get weights of zero.
template <class C, class Use>
__device__ __forceinline__ void sum_stages(KeyShared<C>& shared, const KeyArgs& a,
                                           const KeyItem& item, int group, bool present,
                                           float (&grad_k)[C::kSums], float (&grad_v)[C::kSums],
                                           Use& use) {
  using namespace tile;
  using T = typename C::Type;
  using Product = Wgmma<T, 64, Major::kK>;
  constexpr int kEvery = C::kListed ? 2 : 1;  // stages from one to the next
  const int own = C::kListed ? 0 : group;     // block within shared memory
  // Keys of a block that is missing lie behind all tokens.
  const int first_key = present ? (item.block + own) * kPageTokens : INT_MAX / 2;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const bool leader = lane == 0;
  const int stages = count_stages(a, item);
  const int key = first_key + static_cast<int>(threadIdx.x % 128 / 32) * 16 + lane / 4;
  const int column = lane % 4 * 2;
  const std::uint64_t k_desc = smem_desc_k_major(shared.k[own]);
  const std::uint64_t v_desc = smem_desc_k_major(shared.v[own]);
#pragma unroll
  for (int i = 0; i < C::kSums; ++i) grad_k[i] = grad_v[i] = 0;
  const auto multiply = [](float(&d)[32], std::uint64_t keys, std::uint64_t rows) {
#pragma unroll
    for (int k = 0; k < C::kDim / 16; ++k) {
      const std::uint64_t at = k / 4 * (kPanelBytes / 16) + k % 4 * kStepKMajor;
      Product::ss(d, keys + at, rows + at, k != 0);
    }
    wgmma_commit();
  };
  // The warpgroups take turns at starting sums and the next product: side by side they would also
  // make weights side by side, with nothing to multiply.
  const auto wait_turn = [&] { named_barrier_sync(4 + group, 256); };
  const auto pass_turn = [&] { named_barrier_arrive(5 - group, 256); };
  if (group == 1) pass_turn();
  if (stages > 0) mbarrier_wait(&shared.blocks_full, 0);
  int before = -1;  // the stage of the ring whose sums are under way
  for (int stage = C::kListed ? group : 0; stage < stages; stage += kEvery) {
    const int slot = uniform(stage % C::kStages);
    mbarrier_wait(&shared.full[slot], stage / C::kStages & 1);
    const auto& rows = shared.rows[slot];
    // Not carried from stage to stage, which the compiler would take for a use.
    float p[32], grad_p[32], spare[32];
    auto& product = C::kDim == 128 ? p : spare;  // registers are short, and p's are free by then
    std::uint32_t weights[16], grad_s[16];
    wgmma_fence();
    multiply(p, k_desc, smem_desc_k_major(shared.q[slot]));
    if (before >= 0) pass_turn();
    // Sums of the stage before: their operands' registers are needed for the other product.
    wgmma_wait<1>();
    if (before >= 0 && leader) mbarrier_arrive(&shared.empty[before]);
    wgmma_fence();
    multiply(grad_p, v_desc, smem_desc_k_major(shared.grad_o[slot]));
    wgmma_wait<1>();
    wgmma_pin(p);
    if (rows.position[0] < first_key + kPageTokens - 1) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int position = rows.position[(column + i / 4 * 8 + i % 2) >> a.group_log2];
        if (key + i / 2 % 2 * 8 > position) p[i] = -kInfinity;
      }
    }
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      const float4 stats = *reinterpret_cast<const float4*>(rows.stats + 2 * i + column);
      p[i] = fast_exp2(fmaf(p[i], a.c, -stats.x));
      p[i + 1] = fast_exp2(fmaf(p[i + 1], a.c, -stats.z));
      p[i + 2] = fast_exp2(fmaf(p[i + 2], a.c, -stats.x));
      p[i + 3] = fast_exp2(fmaf(p[i + 3], a.c, -stats.z));
    }
    wgmma_wait<0>();
    wgmma_pin(grad_p);
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      const float4 stats = *reinterpret_cast<const float4*>(rows.stats + 2 * i + column);
      grad_s[i / 2] = pack2<T>(p[i] * (grad_p[i] - stats.y), p[i + 1] * (grad_p[i + 1] - stats.w));
      grad_s[i / 2 + 1] =
          pack2<T>(p[i + 2] * (grad_p[i + 2] - stats.y), p[i + 3] * (grad_p[i + 3] - stats.w));
      weights[i / 2] = pack2<T>(p[i], p[i + 1]);
      weights[i / 2 + 1] = pack2<T>(p[i + 2], p[i + 3]);
    }
    use.publish(stage, grad_s);
    wait_turn();
    use.multiply(stage, product);
    wgmma_fence();
    add_product<C>(grad_v, weights, smem_desc_mn_major(shared.grad_o[slot]));
    add_product<C>(grad_k, grad_s, smem_desc_mn_major(shared.q[slot]));
    wgmma_commit();
    use.finish(stage, product);
    before = slot;
    __syncwarp();  // all lanes have read their statistics
  }
  if (before >= 0) pass_turn();
  wgmma_wait<0>();
  wgmma_pin(grad_k);
  wgmma_pin(grad_v);
}

// Writes 64 keys' sums times `factor`, as a warpgroup holds them, but for keys behind the
// sequence's end; zeros for a block that is not `present`.
template <class C>
__device__ __forceinline__ void store_keys(void* to, const float (&sum)[C::kSums], float factor,
                                           const KeyArgs& a, int sequence, int block, int head,
                                           bool present) {
  const int length = a.batch.kv_length[sequence];
  const std::int64_t before =
      backward::keys_before(a.batch, sequence, static_cast<int>(threadIdx.x % 32));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int key = block * kPageTokens + static_cast<int>(threadIdx.x % 128 / 32) * 16 +
                    static_cast<int>(threadIdx.x % 32 / 4) + 8 * i;
    std::uint32_t words[C::kDim / 8];
#pragma unroll
    for (int j = 0; j < C::kDim / 8; ++j) {
      const float x = sum[4 * j + 2 * i] * factor;
      const float y = sum[4 * j + 2 * i + 1] * factor;
      words[j] = present ? tile::pack2<typename C::Type>(x, y) : 0;
    }
    store_row<C>(static_cast<typename C::Type*>(to) + ((before + key) * a.heads + head) * C::kDim,
                 words, key < length);
  }
}

}  // namespace infllm::cuda::sm90
