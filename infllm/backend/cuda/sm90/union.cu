// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "infllm/backend/cuda/sm90/tiles.cuh"
#include "infllm/backend/cuda/sm90/union.h"

namespace infllm::cuda::sm90 {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kSpan = 2048;  // blocks that are looked at together

struct UnionArgs {
  Batch batch;
  const std::int32_t* selection;  // [Hkv, T, columns]
  std::int32_t columns;
  std::int32_t heads;
  std::int32_t num_pages;
  std::int32_t tile_tokens;
  std::int32_t first;
  UnionLists lists;
};

// atomicOr on a set inside its 32-bit word.
__device__ void add_token(std::uint16_t* sets, int block, int token) {
  auto* words = reinterpret_cast<unsigned*>(sets);
  atomicOr(words + block / 2, 1u << (token + block % 2 * 16));
}
__device__ void add_token(unsigned long long* sets, int block, int token) {
  atomicOr(sets + block, 1ull << token);
}

// Tokens of at most one warp of each four.
template <typename Set>
__device__ bool is_single(Set set, int warp_tokens) {
  if (warp_tokens == 0) return false;
  const Set warp = (Set{1} << warp_tokens) - 1;
  for (; set != 0; set >>= 3 * warp_tokens, set >>= warp_tokens) {
    int warps = 0;
    for (int i = 0; i < 4; ++i) warps += (set >> (i * warp_tokens) & warp) != 0;
    if (warps > 1) return false;
  }
  return true;
}

// One thread block a tile. The sets of kSpan blocks stand in shared memory; tokens' lists are
// thrown into them, and what is not empty is written out in order.
template <typename Set>
__global__ void __launch_bounds__(kThreads) union_kernel(const UnionArgs a) {
  __shared__ Tile tile;
  __shared__ __align__(8) Set sets[kSpan];
  __shared__ int counts[kWarps];  // of the others, and of the singles 16 bits higher
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  if (warp == 0) {
    const int tiles = count_tiles(a.batch, a.tile_tokens, true);
    const Tile found =
        find_tile(a.batch, a.tile_tokens, true, tiles, a.heads, a.first + blockIdx.x);
    if (lane == 0) tile = found;
  }
  __syncthreads();
  if (tile.index < 0) return;
  const Sequence sequence(a.batch, tile.sequence);
  const int blocks = tile.blocks(a.tile_tokens);
  const int first = max(tile.begin, tile.first_token) - tile.first_token;  // tokens of the tile
  const int last = min(tile.end, tile.first_token + a.tile_tokens) - tile.first_token;
  const std::int32_t* chosen =
      a.selection + (std::int64_t{tile.head} * a.batch.num_tokens + tile.first_token) * a.columns;
  const std::int64_t list = std::int64_t{blockIdx.x} * a.lists.capacity;
  auto* out = static_cast<Set*>(a.lists.tokens);
  int singles = 0, others = 0;  // written so far
  for (int span = 0; span < blocks; span += kSpan) {
    for (int i = thread; i < kSpan; i += kThreads) sets[i] = 0;
    __syncthreads();
    for (int i = first * a.columns + thread; i < last * a.columns; i += kThreads) {
      const int token = i / a.columns;
      const int block = chosen[i] - span;
      const int own = (tile.position + token) / kPageTokens - span;
      if (block >= 0 && block < kSpan && block <= own) add_token(sets, block, token);
    }
    __syncthreads();
    for (int base = 0; base < min(kSpan, blocks - span); base += kThreads) {
      const Set set = sets[base + thread];
      const int block = span + base + thread;
      const bool wanted = set != 0 && sequence.page(block, a.num_pages) >= 0;
      const bool single =
          wanted && block < tile.position / kPageTokens && is_single(set, a.lists.warp_tokens);
      const unsigned ballots[2] = {__ballot_sync(0xffffffff, wanted && !single),
                                   __ballot_sync(0xffffffff, single)};
      if (lane == 0) counts[warp] = __popc(ballots[0]) | __popc(ballots[1]) << 16;
      __syncthreads();
      int rank = __popc(ballots[single] & ((1u << lane) - 1)) + (single ? singles : others);
      for (int w = 0; w < kWarps; ++w) {
        const int more[2] = {counts[w] & 0xffff, counts[w] >> 16};
        if (w < warp) rank += more[single];
        others += more[0];
        singles += more[1];
      }
      if (wanted && rank < a.lists.capacity) {
        const std::int64_t at = list + (single ? rank : a.lists.capacity - 1 - rank);
        a.lists.blocks[at] = block;
        out[at] = set;
      }
      __syncthreads();
    }
  }
  if (thread == 0) {
    a.lists.counts[blockIdx.x] = singles + others;
    a.lists.singles[blockIdx.x] = singles;
  }
}

}  // namespace

std::int64_t union_capacity(const AttendParams& params, int tile_tokens) {
  return std::min<std::int64_t>(std::int64_t{params.columns} * tile_tokens,
                                ceil_div(params.batch.max_kv_length, kPageTokens));
}

void launch_union(const AttendParams& params, int tile_tokens, int first, int count,
                  const UnionLists& lists, cudaStream_t stream) {
  const UnionArgs args{
      params.batch,           params.selection, params.columns, params.pages.layout.kv_heads,
      params.pages.num_pages, tile_tokens,      first,          lists};
  if (lists.token_bytes == 2) {
    union_kernel<std::uint16_t><<<count, kThreads, 0, stream>>>(args);
  } else {
    union_kernel<unsigned long long><<<count, kThreads, 0, stream>>>(args);
  }
}

}  // namespace infllm::cuda::sm90
