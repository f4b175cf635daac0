// SPDX-License-Identifier: Apache-2.0
//
// All gradients of dense batches on Hopper, in one pass. A thread block holds K and V of a pair of
// blocks, 128 keys, and walks a chunk of tokens (attend_backward_stages.cuh). Its two computing
// warpgroups own dK and dV of a block each, and hand dS to each other through shared memory for
//
//   dQ = dS K, of 64 rows, added to float sums in memory
//
// Sums are added in a fixed order. The pairs of keys that a tile of rows sees take turns at it, the
// first pair first; so do the chunks that a pair of keys sees. Thread blocks take their items from
// a counter, in an order in which nobody waits for an item behind his own: chunk after chunk, and
// within a chunk pair after pair, of two KV heads by turns. All pairs walk a chunk's tiles from the
// last one down, so that a thread block finds its turn come if it began a little after the one
// before of its head. Q, dO and the sums of a chunk and of two heads stay in L2 meanwhile.
#pragma once

#include "infllm/backend/cuda/sm90/attend_backward_stages.cuh"

namespace infllm::cuda::sm90 {

struct DenseArgs {
  KeyArgs keys;           // sums: [sequences, heads, pairs, 2 blocks, 2, D / 8, 128, 4]
  float* query_sums;      // [heads, slots, D / 64, 8, 128, 4] dQ of tiles, as threads hold it
  unsigned* query_turns;  // [heads, slots] whose turn it is: a pair
  unsigned* key_turns;    // [sequences, heads, pairs, 2 blocks] whose turn it is: a chunk
  unsigned* next;         // item
  void* grad_q;
  std::int32_t pairs;
  std::int32_t heads_together;
  std::int32_t chunk_tiles;
  std::int32_t first_chunk;  // of this launch
  std::int32_t slots;        // tiles that query_sums has room for
  std::int32_t slot_stride;  // slots of a sequence; 0: as many as it has tiles
};

// A tile is 64 rows, 64 / G tokens. Those of a chunk are counted from its end.
struct Chunk {
  __device__ Chunk(const DenseArgs& a, const Sequence& sequence, int sequence_index, int index)
      : tile_tokens(64 >> a.keys.group_log2),
        begin(index * a.chunk_tiles * tile_tokens),
        end(min(begin + a.chunk_tiles * tile_tokens, sequence.tokens)),
        slot((a.slot_stride > 0 ? sequence_index * a.slot_stride
                                : sequence.first_token / tile_tokens + sequence_index) +
             (index - a.first_chunk) * a.chunk_tiles) {}

  int tile_tokens;
  int begin, end;  // tokens of the sequence
  int slot;        // of the chunk's first tile
};

struct DenseItem : KeyItem {
  std::int32_t chunk;
  std::int32_t slot;
  std::int32_t first;     // packed token
  bool is_first = false;  // no chunk before this one sees the keys
};

__device__ __forceinline__ DenseItem find_item(const DenseArgs& a, int index) {
  DenseItem item;
  const Batch& batch = a.keys.batch;
  int rest = index % (a.pairs * a.keys.heads);
  index /= a.pairs * a.keys.heads;
  const int first_head = rest / (a.pairs * a.heads_together) * a.heads_together;
  const int heads = min(a.heads_together, a.keys.heads - first_head);
  rest -= first_head * a.pairs;
  item.head = first_head + rest % heads;
  item.block = rest / heads * 2;
  item.sequence = index % batch.num_sequences;
  item.chunk = a.first_chunk + index / batch.num_sequences;
  const Sequence sequence(batch, item.sequence);
  const Chunk chunk(a, sequence, item.sequence, item.chunk);
  const int seeing = max(0, item.block * kPageTokens - sequence.first_position());
  const int begin = max(chunk.begin, seeing);
  item.count = max(0, chunk.end - begin);
  item.first = sequence.first_token + begin;
  item.slot = chunk.slot;
  item.is_first = seeing >= chunk.begin;
  item.exists = item.count > 0;
  return item;
}

__device__ __forceinline__ std::int64_t key_slot(const DenseArgs& a, const KeyItem& item) {
  return ((std::int64_t{item.sequence} * a.keys.heads + item.head) * a.pairs * 2) + item.block;
}

__device__ __forceinline__ void await_turn(const unsigned* turn, unsigned mine) {
  unsigned now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
  } while (now != mine);
}

// Everything that this thread has seen happen has happened for whoever takes his turn now: what the
// thread block's others did too, because a release is cumulative.
__device__ __forceinline__ void give_turn(unsigned* turn, unsigned next) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(turn), "r"(next) : "memory");
}

// Four floats of each thread, to sums of [.., 128, 4].
__device__ __forceinline__ void add_four(float* to, const float* x, bool is_first) {
  if (is_first) {
    *static_cast<float4*>(__builtin_assume_aligned(to, 16)) = float4{x[0], x[1], x[2], x[3]};
  } else {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]),
                 "f"(x[2]), "f"(x[3])
                 : "memory");
  }
}

template <class C>
struct __align__(1024) DenseShared : KeyShared<C> {
  alignas(1024) std::byte grad_s[C::kGrads][C::kGradBytes];  // of [2 blocks][64 keys][64 rows]
  std::uint64_t grad_full[C::kGrads], grad_empty[C::kGrads];
  // Of a tile: it is this item's turn; its share of dQ is added; the turn is given away.
  std::uint64_t open[2], added[2], given[2];
  std::int32_t index;
};

// dQ of a stage, made by both computing warpgroups one stage later: then the other one's dS is
// there. Each owns half of the dimensions.
template <class C>
class QueryProduct {
 public:
  __device__ __forceinline__ QueryProduct(DenseShared<C>& shared, const DenseArgs& a,
                                          const DenseItem& item, int group)
      : shared_(shared),
        group_(group),
        is_first_(item.block == 0),
        to_(a.query_sums + (std::int64_t{item.head} * a.slots + item.slot) * C::kSumFloats +
            group * (kCount * 128) + threadIdx.x % 128 * 4) {}

  // dS^T lies in registers as the product left it; in shared memory rows of 64 are contiguous.
  __device__ __forceinline__ void publish(int stage, const std::uint32_t (&grad_s)[16]) {
    using namespace tile;
    const int at = stage % C::kGrads;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int key = static_cast<int>(threadIdx.x % 128 / 32) * 16 + lane % 16;
    mbarrier_wait(&shared_.grad_empty[at], (stage / C::kGrads & 1) ^ 1);
    std::byte* to = shared_.grad_s[at] + group_ * kPanelBytes;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const std::uint32_t four[4] = {grad_s[4 * k], grad_s[4 * k + 1], grad_s[4 * k + 2],
                                     grad_s[4 * k + 3]};
      stmatrix_x4(to + swizzled(key, 2 * k + lane / 16), four);
    }
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&shared_.grad_full[at]);
  }

  // The stage before `stage`. Before the first one there is none, and nobody looks at the product.
  __device__ __forceinline__ void multiply(int stage, float (&p)[32]) {
    using namespace tile;
    const int at = uniform((stage + C::kGrads - 1) % C::kGrads);
    if (stage > 0) mbarrier_wait(&shared_.grad_full[at], (stage - 1) / C::kGrads & 1);
    const std::uint64_t grads = smem_desc_mn_major(shared_.grad_s[at]);
    const std::uint64_t keys =
        smem_desc_mn_major(shared_.k[0]) + group_ * (C::kPanels == 2 ? kPanelBytes / 16 : 64 / 16);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      Wgmma::ss(product(p), grads + k / 4 * (kPanelBytes / 16) + k % 4 * kStepMnMajor,
                keys + k / 4 * (C::kTileBytes / 16) + k % 4 * kStepMnMajor, k != 0);
    }
    wgmma_commit();
  }

  // Adds it, when it is this item's turn. `kLater` products were started after it.
  template <int kLater = 1>
  __device__ __forceinline__ void finish(int stage, float (&p)[32]) {
    using namespace tile;
    wgmma_wait<kLater>();
    wgmma_pin(product(p));
    if (stage == 0) return;
    const bool leader = threadIdx.x % 32 == 0;
    const int at = (stage - 1) % C::kGrads;
    if (leader) mbarrier_arrive(&shared_.grad_empty[at]);
    mbarrier_wait(&shared_.open[at], (stage - 1) / 2 & 1);
#pragma unroll
    for (int i = 0; i < kCount; i += 4) add_four(to_ + i * 128, p + i, is_first_);
    to_ += C::kSumFloats;
    __syncwarp();
    if (leader) mbarrier_arrive(&shared_.added[at]);
  }

 private:
  static constexpr int kCount = C::kDim / 4;  // numbers of a thread
  using Wgmma = tile::Wgmma<typename C::Type, C::kDim / 2, tile::Major::kMN, tile::Major::kMN>;
  static_assert(C::kGrads == 2);

  __device__ __forceinline__ static float (&product(float (&p)[32]))[kCount] {
    return reinterpret_cast<float(&)[kCount]>(p);
  }

  DenseShared<C>& shared_;
  int group_;
  bool is_first_;
  float* to_;
};

// A computing warpgroup.
template <class C>
__device__ __forceinline__ void compute(DenseShared<C>& shared, const DenseArgs& a,
                                        const DenseItem& item, int group) {
  using namespace tile;
  const int block = item.block + group;
  const Sequence sequence(a.keys.batch, item.sequence);
  const int written = sequence.length - block * kPageTokens;
  const bool present = written > 0 && sequence.page(block, a.keys.pool.num_pages) >= 0;
  if (written < kPageTokens) {
    mbarrier_wait(&shared.blocks_full, 0);
    clear_tail<C>(shared.k[group], max(0, written), group);
    clear_tail<C>(shared.v[group], max(0, written), group);
  }
  float grad_k[C::kSums], grad_v[C::kSums];
  QueryProduct<C> queries(shared, a, item, group);
  sum_stages<C>(shared, a.keys, item, group, present, grad_k, grad_v, queries);
  const int stages = count_stages(a.keys, item);
  float p[32];
  queries.multiply(stages, p);
  queries.template finish<0>(stages, p);

  const std::int64_t slot = key_slot(a, item) + group;
  const int thread = static_cast<int>(threadIdx.x % 128);
  const auto chunk = static_cast<unsigned>(item.chunk);
  if (!item.is_first) {
    if (thread == 0) await_turn(a.key_turns + slot, chunk);
    named_barrier_sync(1 + group, 128);
  }
  float* to = a.keys.sums + slot * 2 * C::kSumFloats + thread * 4;
#pragma unroll
  for (int i = 0; i < C::kSums; i += 4) {
    add_four(to + i * 128, grad_k + i, item.is_first);
    add_four(to + C::kSumFloats + i * 128, grad_v + i, item.is_first);
  }
  named_barrier_sync(1 + group, 128);
  if (thread == 0) give_turn(a.key_turns + slot, chunk + 1);
}

// A thread that sees whose turn it is at each of the item's tiles, and one that gives turns away.
template <class C>
__device__ __forceinline__ void await_turns(DenseShared<C>& shared, const unsigned* turn,
                                            unsigned mine, int stages) {
  for (int stage = 0; stage < stages; ++stage, ++turn) {
    if (stage >= 2) tile::mbarrier_wait(&shared.given[stage % 2], (stage / 2 - 1) & 1);
    if (mine > 0) await_turn(turn, mine);
    tile::mbarrier_arrive(&shared.open[stage % 2]);
  }
}

template <class C>
__device__ __forceinline__ void give_turns(DenseShared<C>& shared, unsigned* turn, unsigned mine,
                                           int stages) {
  for (int stage = 0; stage < stages; ++stage, ++turn) {
    tile::mbarrier_wait(&shared.added[stage % 2], stage / 2 & 1);
    give_turn(turn, mine + 1);
    tile::mbarrier_arrive(&shared.given[stage % 2]);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    dense_gradient_kernel(const __grid_constant__ CUtensorMap q_token_map,
                          const __grid_constant__ CUtensorMap q_stage_map,
                          const __grid_constant__ CUtensorMap grad_o_token_map,
                          const __grid_constant__ CUtensorMap grad_o_stage_map,
                          const __grid_constant__ CUtensorMap k_map,
                          const __grid_constant__ CUtensorMap v_map,
                          const __grid_constant__ DenseArgs a) {
  using namespace tile;
  extern __shared__ std::byte memory[];
  auto& shared = *reinterpret_cast<DenseShared<C>*>(memory + bytes_to_skip(memory));
  const int warp = warp_index();
  if (threadIdx.x == 0) {
    shared.index = static_cast<int>(atomicAdd(a.next, 1u));
    init_barriers(shared);
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&shared.grad_full[i], 8);
      mbarrier_init(&shared.grad_empty[i], 8);
      mbarrier_init(&shared.open[i], 1);
      mbarrier_init(&shared.added[i], 8);
      mbarrier_init(&shared.given[i], 1);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  const DenseItem item = find_item(a, shared.index);
  if (!item.exists) return;
  if (warp < 4) {
    setmaxnreg_dec<C::kFeedRegisters>();
    const int stages = count_stages(a.keys, item);
    if (warp % 2 == 0) {
      feed_rows<C>(shared, a.keys, item, warp == 0 ? q_token_map : grad_o_token_map,
                   warp == 0 ? q_stage_map : grad_o_stage_map, k_map, v_map, warp,
                   [&](int i) { return item.first + i; });
    } else if (threadIdx.x % 32 == 0) {
      unsigned* turn = a.query_turns + std::int64_t{item.head} * a.slots + item.slot;
      const auto mine = static_cast<unsigned>(item.block / 2);
      warp == 1 ? await_turns<C>(shared, turn, mine, stages)
                : give_turns<C>(shared, turn, mine, stages);
    }
  } else {
    setmaxnreg_inc<C::kComputeRegisters>();
    compute<C>(shared, a, item, warp / 4 - 1);
  }
  __syncthreads();  // nobody leaves while others meet at barriers
}

// Rounds the sums of dK (y = 0) and dV (1) of block x of 64 keys.
template <class C>
__global__ void __launch_bounds__(128) round_keys_kernel(const __grid_constant__ DenseArgs a) {
  int index = static_cast<int>(blockIdx.x);
  const int block = index % (a.pairs * 2);
  index /= a.pairs * 2;
  const int head = index % a.keys.heads;
  const int sequence_index = index / a.keys.heads;
  const Sequence sequence(a.keys.batch, sequence_index);
  if (block * kPageTokens >= sequence.length) return;
  const int which = static_cast<int>(blockIdx.y);
  const bool present = sequence.tokens > 0 && sequence.page(block, a.keys.pool.num_pages) >= 0;
  float sum[C::kSums];
  const float* from =
      a.keys.sums + (std::int64_t{blockIdx.x} * 2 + which) * C::kSumFloats + threadIdx.x * 4;
#pragma unroll
  for (int i = 0; i < C::kSums; i += 4) {
    const float4 x = present ? *reinterpret_cast<const float4*>(from + i * 128) : float4{};
    sum[i] = x.x, sum[i + 1] = x.y, sum[i + 2] = x.z, sum[i + 3] = x.w;
  }
  store_keys<C>(which == 0 ? a.keys.grad_k : a.keys.grad_v, sum, which == 0 ? a.keys.scale : 1.0f,
                a.keys, sequence_index, block, head, present);
}

// Rounds the sums of dQ. Block x: a tile of this launch's chunks, of sequence y and KV head z.
template <class C>
__global__ void __launch_bounds__(128) round_queries_kernel(const __grid_constant__ DenseArgs a) {
  const int index = static_cast<int>(blockIdx.x) % a.chunk_tiles;  // of the tile
  const int sequence_index = static_cast<int>(blockIdx.y);
  const int head = static_cast<int>(blockIdx.z);
  const Sequence sequence(a.keys.batch, sequence_index);
  const Chunk chunk(a, sequence, sequence_index,
                    a.first_chunk + static_cast<int>(blockIdx.x) / a.chunk_tiles);
  const int first = chunk.end - (index + 1) * chunk.tile_tokens;  // token
  if (first + chunk.tile_tokens <= chunk.begin) return;
  const std::int64_t slot = std::int64_t{head} * a.slots + chunk.slot + index;
  const float* from = a.query_sums + slot * C::kSumFloats + threadIdx.x * 4;
  float sum[C::kSums];
#pragma unroll
  for (int i = 0; i < C::kSums; i += 4) {
    const float4 x = *reinterpret_cast<const float4*>(from + i * 128);
    sum[i] = x.x, sum[i + 1] = x.y, sum[i + 2] = x.z, sum[i + 3] = x.w;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row =
        static_cast<int>(threadIdx.x / 32) * 16 + static_cast<int>(threadIdx.x % 32 / 4) + 8 * i;
    const int token = first + (row >> a.keys.group_log2);
    const int head_q = (head << a.keys.group_log2) + (row & ((1 << a.keys.group_log2) - 1));
    std::uint32_t words[C::kDim / 8];
#pragma unroll
    for (int j = 0; j < C::kDim / 8; ++j) {
      words[j] = tile::pack2<typename C::Type>(sum[4 * j + 2 * i] * a.keys.scale,
                                               sum[4 * j + 2 * i + 1] * a.keys.scale);
    }
    const std::int64_t at =
        std::int64_t{sequence.first_token + token} * (a.keys.heads << a.keys.group_log2) + head_q;
    store_row<C>(static_cast<typename C::Type*>(a.grad_q) + at * C::kDim, words,
                 token >= chunk.begin);
  }
}

}  // namespace infllm::cuda::sm90
