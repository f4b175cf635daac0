// SPDX-License-Identifier: Apache-2.0
//
// dK and dV on Hopper, block-major. A thread block holds K and V of one block of 64 keys (sparse),
// or of two neighbouring ones (dense), and walks the tokens that chose it, the last one first, in
// stages of 64 rows (token, head of the group):
//
//   S^T = K Q^T   dP^T = V dO^T   P^T = 2^(c S^T - LSE)   dS^T = P^T (dP^T - Delta)
//   dV += P^T dO  dK += dS^T Q
//
// The products are turned round so that weights go from accumulators into the second products as
// their left operands. A stage's rows are fetched by TMA, one box for each token and 64 dimensions,
// or one for all tokens where they are neighbours. Two warpgroups compute: in a sparse pass each
// takes every other stage and the sums are added up at the end; in a dense pass both take every
// stage, one block each.
//
// Long lists are cut into parts (choosers.h), whose float sums a last kernel adds up in order.
#pragma once

#include "infllm/backend/cuda/backward/choosers.h"
#include "infllm/backend/cuda/sm90/attend_backward_passes.h"
#include "infllm/backend/cuda/sm90/attend_rows.cuh"

namespace infllm::cuda::sm90 {

using backward::Choosers;
using backward::ChosenBlock;

template <typename T, int kHeadDim, bool kIsListed>
struct KeyConfig {
  using Type = T;
  static constexpr int kDim = kHeadDim;
  static constexpr bool kListed = kIsListed;
  static constexpr int kBlocks = kListed ? 1 : 2;  // of 64 keys, of a thread block
  static constexpr int kPanels = kDim / 64;
  static constexpr int kTileBytes = 64 * kDim * 2;
  static constexpr int kFit =
      static_cast<int>((kSharedLimit - 2048 - kBlocks * 2 * kTileBytes) / (2 * kTileBytes + 1024));
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kThreads = 3 * 128;
  static constexpr int kComputeRegisters = 240;
  static constexpr int kFeedRegisters = 24;
  static constexpr int kSums = kDim / 2;  // of a thread, for each of dK and dV
  static constexpr int kSumFloats = 64 * kDim;
};

struct KeyGradientArgs {
  Batch batch;
  PagePool pool;
  Choosers choosers;  // sparse
  const RowStatistics* stats;
  void* grad_k;
  void* grad_v;
  float* sums;  // [parts, blocks of a thread block, 2, D / 2, 128] dK and dV as threads hold them
  float scale;
  float c;  // scale log2(e)
  std::int32_t heads;
  std::int32_t group_log2;
  std::int32_t num_parts;    // dense: of a pair of blocks, at most
  std::int32_t part_tokens;  // dense
};

template <class C>
struct __align__(1024) KeyShared {
  alignas(1024) std::byte k[C::kBlocks][C::kTileBytes];
  alignas(1024) std::byte v[C::kBlocks][C::kTileBytes];
  alignas(1024) std::byte q[C::kStages][C::kTileBytes];
  alignas(1024) std::byte grad_o[C::kStages][C::kTileBytes];
  struct Statistics {
    float lse[64];
    float delta[64];
    std::int32_t position[64];  // of each token
  };
  alignas(16) Statistics rows[C::kStages];
  std::uint64_t blocks_full;
  std::uint64_t full[C::kStages], empty[C::kStages];
};

// What a thread block does: tokens `first` .. `first` + count - 1 of a block's list.
struct KeyItem {
  std::int32_t head;
  std::int32_t sequence;
  std::int32_t block;  // the first, if two
  std::int32_t count = 0;
  std::int64_t first = 0;  // in Choosers::tokens, or the packed token
  std::int64_t part = -1;  // whose sums are written; -1: the list is whole
  bool exists = false;
};

template <class C>
__device__ __forceinline__ KeyItem find_item(const KeyGradientArgs& a) {
  KeyItem item;
  if constexpr (C::kListed) {
    const Choosers& c = a.choosers;
    std::int64_t index = static_cast<std::int64_t>(blockIdx.x) - c.part_capacity;
    int part = -1;
    if (index < 0) {
      index = c.parts[blockIdx.x].block;
      part = c.parts[blockIdx.x].part;
      if (index < 0) return item;
    }
    const ChosenBlock chosen = c.blocks[index];
    if (part < 0 && chosen.first_part >= 0) return item;
    item.block = static_cast<int>(index % c.max_blocks);
    item.sequence = static_cast<int>(index / c.max_blocks % a.batch.num_sequences);
    item.head = static_cast<int>(index / c.max_blocks / a.batch.num_sequences);
    const Sequence sequence(a.batch, item.sequence);
    const int skip = part < 0 ? 0 : part * c.part_tokens;
    item.exists = item.block * kPageTokens < sequence.length;
    item.count = part < 0 ? chosen.count : min(c.part_tokens, chosen.count - skip);
    item.first = chosen.start + skip;
    if (!sequence.sparse) {
      item.first = sequence.first_token + skip +
                   max(0, item.block * kPageTokens - sequence.first_position());
    }
    item.part = part < 0 ? -1 : chosen.first_part + part;
    if (sequence.page(item.block, a.pool.num_pages) < 0) item.count = 0;
  } else {
    int index = static_cast<int>(blockIdx.x);
    item.head = index % a.heads;
    index /= a.heads;
    item.sequence = index % a.batch.num_sequences;
    index /= a.batch.num_sequences;
    const int skip = index % a.num_parts * a.part_tokens;
    item.block = index / a.num_parts * 2;
    const Sequence sequence(a.batch, item.sequence);
    const int before = max(0, item.block * kPageTokens - sequence.first_position());
    const int tokens = max(0, sequence.tokens - before);
    item.exists = item.block * kPageTokens < sequence.length && (skip == 0 || skip < tokens);
    item.count = min(a.part_tokens, tokens - skip);
    item.first = sequence.first_token + before + skip;
    item.part = tokens > a.part_tokens ? static_cast<std::int64_t>(blockIdx.x) : -1;
  }
  return item;
}

// A warp of the feeding warpgroup: 64 dimensions of Q (warps 0, 1) or of dO (2, 3). Warp 0 also
// brings the block itself and the rows' statistics.
template <class C>
__device__ __forceinline__ void feed_rows(KeyShared<C>& shared, const KeyGradientArgs& a,
                                          const KeyItem& item, const CUtensorMap& token_map,
                                          const CUtensorMap& stage_map, const CUtensorMap& k_map,
                                          const CUtensorMap& v_map, int warp) {
  using namespace tile;
  constexpr unsigned kAll = 0xffffffff;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int panel = warp % 2;
  const int tokens = 64 >> a.group_log2;  // of a stage
  const int stages = (item.count + tokens - 1) / tokens;
  const Sequence sequence(a.batch, item.sequence);
  const bool listed = C::kListed && sequence.sparse;
  const int first_position = sequence.first_position() - sequence.first_token;  // of token 0
  const int heads_q = a.heads << a.group_log2;
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
  const auto find_token = [&](int stage) {
    const int i = item.count - (stage + 1) * tokens + lane;
    if (lane >= tokens || i < 0 || stage >= stages) return -1;
    return listed ? a.choosers.tokens[item.first + i] : static_cast<int>(item.first) + i;
  };
  // Of rows 2 lane and 2 lane + 1.
  const auto find_statistics = [&](int token) {
    const int owner = __shfl_sync(kAll, token, 2 * lane >> a.group_log2);
    if (owner < 0) return float4{kInfinity, 0, kInfinity, 0};  // weights of zero
    const std::int64_t row = std::int64_t{owner} * heads_q + (item.head << a.group_log2) +
                             (2 * lane & ((1 << a.group_log2) - 1));
    return *reinterpret_cast<const float4*>(a.stats + row);
  };
  int token = find_token(0);
  int next_token = find_token(1);
  float4 stats = {};
  if (warp == 0) stats = find_statistics(token);
  RingCursor<C::kStages> ring;
  for (int stage = 0; stage < stages; ++stage, ring.advance()) {
    const int later_token = find_token(stage + 2);
    float4 next_stats = {};
    if (warp == 0) next_stats = find_statistics(next_token);
    const int first = __shfl_sync(kAll, token, 0);
    const bool together =
        first >= 0 && __all_sync(kAll, lane >= tokens || token == first + lane) != 0;
    mbarrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
    if (warp == 0) {
      auto& rows = shared.rows[ring.stage];
      *reinterpret_cast<float2*>(rows.lse + 2 * lane) = {stats.x, stats.z};
      *reinterpret_cast<float2*>(rows.delta + 2 * lane) = {stats.y, stats.w};
      if (lane < tokens) rows.position[lane] = token < 0 ? -1 : token + first_position;
    }
    std::byte* to = (warp < 2 ? shared.q : shared.grad_o)[ring.stage] + panel * kPanelBytes;
    std::uint64_t* full = &shared.full[ring.stage];
    if (lane == 0) {
      mbarrier_arrive_expect_tx(full, kPanelBytes);
    } else if (warp == 0) {
      mbarrier_arrive(full);  // of the statistics that this lane wrote
    }
    const int head = item.head << a.group_log2;
    if (together) {
      if (lane == 0) tma_load_4d(&stage_map, full, to, 0, head, first, panel);
    } else {
      for (int t = 0; t < tokens; ++t) {
        int owner = __shfl_sync(kAll, token, t);
        if (owner < 0) owner = a.batch.num_tokens;  // reads zeros
        if (lane == 0) {
          tma_load_4d(&token_map, full, to + (t << a.group_log2) * 128, 0, head, owner, panel);
        }
      }
    }
    __syncwarp();
    token = next_token;
    next_token = later_token;
    stats = next_stats;
  }
}

// Keys of the sequences before this one. All lanes of a warp call it.
__device__ inline std::int64_t keys_before(const Batch& batch, int sequence) {
  long long sum = 0;
  for (int b = static_cast<int>(threadIdx.x % 32); b < sequence; b += 32) sum += batch.kv_length[b];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  return sum;
}

// Writes 64 keys' sums times `factor`, as a warpgroup holds them. `length` keys are the sequence's.
template <class C>
__device__ __forceinline__ void store_keys(void* to, const float (&sum)[C::kSums], float factor,
                                           const KeyGradientArgs& a, int sequence, int block,
                                           int head, bool present) {
  const int length = a.batch.kv_length[sequence];
  const std::int64_t before = keys_before(a.batch, sequence);
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

// A computing warpgroup.
template <class C>
__device__ __forceinline__ void compute_keys(KeyShared<C>& shared, const KeyGradientArgs& a,
                                             const KeyItem& item, int group) {
  using namespace tile;
  using T = typename C::Type;
  using Product = Wgmma<T, 64, Major::kK>;
  using Sum = Wgmma<T, C::kDim, Major::kMN>;
  constexpr int kEvery = C::kListed ? 2 : 1;  // stages from one to the next
  const int own = C::kListed ? 0 : group;     // block within shared memory
  const int block = item.block + own;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const bool leader = lane == 0;
  const int stages = (item.count + (64 >> a.group_log2) - 1) / (64 >> a.group_log2);
  const int key = block * kPageTokens + static_cast<int>(threadIdx.x % 128 / 32) * 16 + lane / 4;
  const int column = lane % 4 * 2;
  const std::uint64_t k_desc = smem_desc_k_major(shared.k[own]);
  const std::uint64_t v_desc = smem_desc_k_major(shared.v[own]);
  float grad_k[C::kSums], grad_v[C::kSums];
#pragma unroll
  for (int i = 0; i < C::kSums; ++i) grad_k[i] = grad_v[i] = 0;
  float p[32], grad_p[32];
  std::uint32_t weights[16], grad_s[16];
  const auto multiply = [](float(&d)[32], std::uint64_t keys, std::uint64_t rows) {
#pragma unroll
    for (int k = 0; k < C::kDim / 16; ++k) {
      const std::uint64_t at = k / 4 * (kPanelBytes / 16) + k % 4 * kStepKMajor;
      Product::ss(d, keys + at, rows + at, k != 0);
    }
    wgmma_commit();
  };
  const auto add = [](float(&sum)[C::kSums], const std::uint32_t(&x)[16], std::uint64_t rows) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      Sum::rs(sum, x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3], rows + k * kStepMnMajor, 1);
    }
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
    const auto& rows = shared.rows[slot];
    if (rows.position[0] < block * kPageTokens + kPageTokens - 1) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int position = rows.position[(column + i / 4 * 8 + i % 2) >> a.group_log2];
        if (key + i / 2 % 2 * 8 > position) p[i] = -kInfinity;
      }
    }
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      const float2 lse = *reinterpret_cast<const float2*>(rows.lse + 2 * i + column);
      p[i] = fast_exp2(fmaf(p[i], a.c, -lse.x));
      p[i + 1] = fast_exp2(fmaf(p[i + 1], a.c, -lse.y));
      p[i + 2] = fast_exp2(fmaf(p[i + 2], a.c, -lse.x));
      p[i + 3] = fast_exp2(fmaf(p[i + 3], a.c, -lse.y));
    }
    wgmma_wait<0>();
    wgmma_pin(grad_p);
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      const float2 delta = *reinterpret_cast<const float2*>(rows.delta + 2 * i + column);
      grad_s[i / 2] = pack2<T>(p[i] * (grad_p[i] - delta.x), p[i + 1] * (grad_p[i + 1] - delta.y));
      grad_s[i / 2 + 1] =
          pack2<T>(p[i + 2] * (grad_p[i + 2] - delta.x), p[i + 3] * (grad_p[i + 3] - delta.y));
      weights[i / 2] = pack2<T>(p[i], p[i + 1]);
      weights[i / 2 + 1] = pack2<T>(p[i + 2], p[i + 3]);
    }
    wait_turn();
    wgmma_fence();
    add(grad_v, weights, smem_desc_mn_major(shared.grad_o[slot]));
    add(grad_k, grad_s, smem_desc_mn_major(shared.q[slot]));
    wgmma_commit();
    before = slot;
    __syncwarp();  // all lanes have read their statistics
  }
  if (before >= 0) pass_turn();
  wgmma_wait<0>();
  wgmma_pin(grad_k);
  wgmma_pin(grad_v);

  const auto finish = [&](void* to, const float(&sum)[C::kSums], float factor, int which) {
    if (item.part < 0) {
      const bool present = Sequence(a.batch, item.sequence).page(block, a.pool.num_pages) >= 0;
      store_keys<C>(to, sum, factor, a, item.sequence, block, item.head, present);
      return;
    }
    float* sums = a.sums + ((item.part * C::kBlocks + own) * 2 + which) * C::kSumFloats;
#pragma unroll
    for (int i = 0; i < C::kSums; ++i) sums[i * 128 + threadIdx.x % 128] = sum[i];
  };
  if constexpr (C::kListed) {
    // Each warpgroup gives one of its sums to the other, through the ring, and finishes one.
    static_assert(2 * C::kSumFloats * sizeof(float) <= sizeof(shared.q));
    auto* exchange = reinterpret_cast<float*>(shared.q);
    const int lane_of_group = static_cast<int>(threadIdx.x % 128);
    named_barrier_sync(1, 256);  // nobody needs the ring any more
#pragma unroll
    for (int i = 0; i < C::kSums; ++i) {
      exchange[(group * C::kSums + i) * 128 + lane_of_group] = group == 0 ? grad_v[i] : grad_k[i];
    }
    named_barrier_sync(1, 256);
#pragma unroll
    for (int i = 0; i < C::kSums; ++i) {
      grad_k[i] = (group == 0 ? grad_k[i] : grad_v[i]) +
                  exchange[((1 - group) * C::kSums + i) * 128 + lane_of_group];
    }
    finish(group == 0 ? a.grad_k : a.grad_v, grad_k, group == 0 ? a.scale : 1, group);
  } else {
    finish(a.grad_k, grad_k, a.scale, 0);
    finish(a.grad_v, grad_v, 1, 1);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    key_gradient_kernel(const __grid_constant__ CUtensorMap q_token_map,
                        const __grid_constant__ CUtensorMap q_stage_map,
                        const __grid_constant__ CUtensorMap grad_o_token_map,
                        const __grid_constant__ CUtensorMap grad_o_stage_map,
                        const __grid_constant__ CUtensorMap k_map,
                        const __grid_constant__ CUtensorMap v_map,
                        const __grid_constant__ KeyGradientArgs a) {
  using namespace tile;
  extern __shared__ std::byte memory[];
  auto& shared =
      *reinterpret_cast<KeyShared<C>*>(memory + (1024 - shared_address(memory) % 1024) % 1024);
  const KeyItem item = find_item<C>(a);
  if (!item.exists) return;
  const int warp = warp_index();
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.blocks_full, 1);
    for (int i = 0; i < C::kStages; ++i) {
      mbarrier_init(&shared.full[i], 2 * C::kPanels + 31);  // all lanes of warp 0
      mbarrier_init(&shared.empty[i], C::kListed ? 4 : 8);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (warp < 4) {
    setmaxnreg_dec<C::kFeedRegisters>();
    if (warp % 2 < C::kPanels) {
      feed_rows<C>(shared, a, item, warp < 2 ? q_token_map : grad_o_token_map,
                   warp < 2 ? q_stage_map : grad_o_stage_map, k_map, v_map, warp);
    }
  } else {
    setmaxnreg_inc<C::kComputeRegisters>();
    compute_keys<C>(shared, a, item, warp / 4 - 1);
  }
  __syncthreads();  // nobody leaves while others meet at barriers
}

// Adds up the parts of a cut list. Block (x, y): 64 keys; y: dK, dV.
template <class C>
__global__ void __launch_bounds__(128) add_parts_kernel(const __grid_constant__ KeyGradientArgs a) {
  const int which = static_cast<int>(blockIdx.y);
  int block = 0, sequence = 0, head = 0, parts = 0;
  std::int64_t first = 0, stride = 0;  // of the parts' sums
  if constexpr (C::kListed) {
    const Choosers& c = a.choosers;
    const ChosenBlock chosen = c.blocks[blockIdx.x];
    if (chosen.first_part < 0) return;
    block = static_cast<int>(blockIdx.x % static_cast<unsigned>(c.max_blocks));
    sequence = static_cast<int>(blockIdx.x) / c.max_blocks % a.batch.num_sequences;
    head = static_cast<int>(blockIdx.x) / c.max_blocks / a.batch.num_sequences;
    parts = (chosen.count + c.part_tokens - 1) / c.part_tokens;
    first = chosen.first_part;
    stride = 1;
  } else {
    int index = static_cast<int>(blockIdx.x);
    head = index % a.heads;
    index /= a.heads;
    sequence = index % a.batch.num_sequences;
    block = index / a.batch.num_sequences;
    const Sequence s(a.batch, sequence);
    const int tokens = s.tokens - max(0, block / 2 * 2 * kPageTokens - s.first_position());
    if (block * kPageTokens >= s.length || tokens <= a.part_tokens) return;
    parts = (tokens + a.part_tokens - 1) / a.part_tokens;
    stride = std::int64_t{2} * a.heads * a.batch.num_sequences;
    first = block / 2 * a.num_parts * stride + (sequence * a.heads + head) * 2 + block % 2;
  }
  float sum[C::kSums];
#pragma unroll
  for (int i = 0; i < C::kSums; ++i) sum[i] = 0;
  for (int p = 0; p < parts; ++p) {
    const float* from = a.sums + ((first + p * stride) * 2 + which) * C::kSumFloats + threadIdx.x;
#pragma unroll
    for (int i = 0; i < C::kSums; ++i) sum[i] += from[i * 128];
  }
  const bool present = Sequence(a.batch, sequence).page(block, a.pool.num_pages) >= 0;
  store_keys<C>(which == 0 ? a.grad_k : a.grad_v, sum, which == 0 ? a.scale : 1.0f, a, sequence,
                block, head, present);
}

}  // namespace infllm::cuda::sm90
