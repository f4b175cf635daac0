// SPDX-License-Identifier: Apache-2.0
//
// dK and dV of sparse batches on Hopper, block-major. A thread block holds K and V of one block of
// 64 keys and walks the tokens that chose it (attend_backward_stages.cuh). Its two warpgroups take
// every other stage and add up their sums at the end.
//
// Long lists are cut into parts (choosers.h), whose float sums a last kernel adds up in order.
#pragma once

#include "infllm/backend/cuda/backward/keys.cuh"
#include "infllm/backend/cuda/sm90/attend_backward_stages.cuh"

namespace infllm::cuda::sm90 {

using backward::Choosers;
using backward::ChosenBlock;

struct ListedArgs {
  KeyArgs keys;  // sums: [parts, 2, D / 2, 128] dK and dV as threads hold them
  Choosers choosers;
};

struct ListedItem : KeyItem {
  bool listed = false;     // else the sequence is dense, and everybody chose the block
  std::int64_t first = 0;  // in Choosers::tokens, or the packed token
  std::int64_t part = -1;  // whose sums are written; -1: the list is whole
};

__device__ __forceinline__ ListedItem find_item(const ListedArgs& a) {
  ListedItem item;
  const Choosers& c = a.choosers;
  const Batch& batch = a.keys.batch;
  std::int64_t index = static_cast<std::int64_t>(blockIdx.x) - c.part_capacity;
  int part = -1;
  if (index < 0) {
    index = c.parts[blockIdx.x].block;
    part = c.parts[blockIdx.x].part;
    if (index < 0) return item;
  }
  const ChosenBlock chosen = c.blocks[index];
  if (part < 0 && chosen.first_part >= 0) return item;
  const backward::BlockPlace place(c, batch, index);
  item.block = place.block;
  item.sequence = place.sequence;
  item.head = place.head;
  const Sequence sequence(batch, item.sequence);
  const int skip = part < 0 ? 0 : part * c.part_tokens;
  item.exists = item.block * kPageTokens < sequence.length;
  item.count = part < 0 ? chosen.count : min(c.part_tokens, chosen.count - skip);
  item.first = chosen.start + skip;
  item.listed = sequence.sparse;
  if (!sequence.sparse) {
    item.first =
        sequence.first_token + skip + max(0, item.block * kPageTokens - sequence.first_position());
  }
  item.part = part < 0 ? -1 : chosen.first_part + part;
  if (sequence.page(item.block, a.keys.pool.num_pages) < 0) item.count = 0;
  return item;
}

// Nothing is made of dS but dK.
struct NoUse {
  __device__ __forceinline__ void publish(int, const std::uint32_t (&)[16]) {}
  __device__ __forceinline__ void multiply(int, float (&)[32]) {}
  __device__ __forceinline__ void finish(int, float (&)[32]) {}
};

// A computing warpgroup.
template <class C>
__device__ __forceinline__ void compute_keys(KeyShared<C>& shared, const KeyArgs& a,
                                             const ListedItem& item, int group) {
  using namespace tile;
  float grad_k[C::kSums], grad_v[C::kSums];
  NoUse use;
  sum_stages<C>(shared, a, item, group, true, grad_k, grad_v, use);
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
  if (item.part < 0) {
    const bool present = Sequence(a.batch, item.sequence).page(item.block, a.pool.num_pages) >= 0;
    store_keys<C>(group == 0 ? a.grad_k : a.grad_v, grad_k, group == 0 ? a.scale : 1, a,
                  item.sequence, item.block, item.head, present);
    return;
  }
  float* sums = a.sums + (item.part * 2 + group) * C::kSumFloats;
#pragma unroll
  for (int i = 0; i < C::kSums; ++i) sums[i * 128 + lane_of_group] = grad_k[i];
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    key_gradient_kernel(const __grid_constant__ CUtensorMap q_token_map,
                        const __grid_constant__ CUtensorMap q_stage_map,
                        const __grid_constant__ CUtensorMap grad_o_token_map,
                        const __grid_constant__ CUtensorMap grad_o_stage_map,
                        const __grid_constant__ CUtensorMap k_map,
                        const __grid_constant__ CUtensorMap v_map,
                        const __grid_constant__ ListedArgs a) {
  using namespace tile;
  extern __shared__ std::byte memory[];
  auto& shared = *reinterpret_cast<KeyShared<C>*>(memory + bytes_to_skip(memory));
  const ListedItem item = find_item(a);
  if (!item.exists) return;
  const int warp = warp_index();
  if (threadIdx.x == 0) {
    init_barriers(shared);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (warp < 4) {
    setmaxnreg_dec<C::kFeedRegisters>();
    feed_rows<C>(shared, a.keys, item, warp < 2 ? q_token_map : grad_o_token_map,
                 warp < 2 ? q_stage_map : grad_o_stage_map, k_map, v_map, warp, [&](int i) {
                   return item.listed ? a.choosers.tokens[item.first + i]
                                      : static_cast<int>(item.first) + i;
                 });
  } else {
    setmaxnreg_inc<C::kComputeRegisters>();
    compute_keys<C>(shared, a.keys, item, warp / 4 - 1);
  }
  __syncthreads();  // nobody leaves while others meet at barriers
}

// Adds up the parts of a cut list. Block (x, y): 64 keys; y: dK, dV.
template <class C>
__global__ void __launch_bounds__(128) add_parts_kernel(const __grid_constant__ ListedArgs args) {
  const KeyArgs& a = args.keys;
  const Choosers& c = args.choosers;
  const int which = static_cast<int>(blockIdx.y);
  const ChosenBlock chosen = c.blocks[blockIdx.x];
  if (chosen.first_part < 0) return;
  const int block = static_cast<int>(blockIdx.x % static_cast<unsigned>(c.max_blocks));
  const int sequence = static_cast<int>(blockIdx.x) / c.max_blocks % a.batch.num_sequences;
  const int head = static_cast<int>(blockIdx.x) / c.max_blocks / a.batch.num_sequences;
  const int parts = (chosen.count + c.part_tokens - 1) / c.part_tokens;
  float sum[C::kSums];
#pragma unroll
  for (int i = 0; i < C::kSums; ++i) sum[i] = 0;
  for (int p = 0; p < parts; ++p) {
    const float* from =
        a.sums + (std::int64_t{chosen.first_part + p} * 2 + which) * C::kSumFloats + threadIdx.x;
#pragma unroll
    for (int i = 0; i < C::kSums; ++i) sum[i] += from[i * 128];
  }
  const bool present = Sequence(a.batch, sequence).page(block, a.pool.num_pages) >= 0;
  store_keys<C>(which == 0 ? a.grad_k : a.grad_v, sum, which == 0 ? a.scale : 1.0f, a, sequence,
                block, head, present);
}

}  // namespace infllm::cuda::sm90
