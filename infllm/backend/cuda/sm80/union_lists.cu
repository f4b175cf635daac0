// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/sm80/token_tile.cuh"
#include "infllm/backend/cuda/sm80/union_lists.h"

namespace infllm::cuda::sm80 {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kWindow = 4096;  // blocks that are marked in shared memory at once
constexpr int kWarpBlocks = kWindow / kWarps;

struct UnionArgs {
  Batch batch;
  const std::int32_t* selection;  // [Hkv, T, columns]
  std::int32_t columns;
  int tile_tokens;
  UnionLists lists;
};

// Sets the token bits of the blocks first .. first + kWindow - 1.
__device__ void mark(const UnionArgs& a, const TokenTile& tile, int head, int first,
                     std::uint32_t* marks) {
  const std::int32_t* rows =
      a.selection + (std::int64_t{head} * a.batch.num_tokens + tile.token) * a.columns;
  for (int i = static_cast<int>(threadIdx.x); i < tile.tokens * a.columns; i += kThreads) {
    const int token = i / a.columns;
    const int block = rows[i];
    if (block < first || block >= first + kWindow) continue;
    if (block > (tile.first + token) / kPageTokens) continue;
    atomicOr(&marks[block - first], 1u << token);
  }
}

// Block (x, y): the tile of slot x, KV head y. Each warp owns a quarter of the marks; a first pass
// counts its blocks, a second one writes them behind those of the warps before it.
__global__ void __launch_bounds__(kThreads) union_kernel(UnionArgs a) {
  __shared__ std::uint32_t marks[kWindow];
  __shared__ int counted[kWarps];
  const int slot = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  const TokenTile tile = token_tile(a.batch, a.tile_tokens, slot);
  if (tile.tokens == 0 || a.batch.sparse[tile.sequence] == 0) return;
  const std::int64_t list = head * a.lists.slots + slot;
  UnionEntry* entries = a.lists.entries + list * a.lists.capacity;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int end = (tile.first + tile.tokens - 1) / kPageTokens + 1;
  int written = 0;
  for (int first = 0; first < end; first += kWindow) {
    for (int i = static_cast<int>(threadIdx.x); i < kWindow; i += kThreads) marks[i] = 0;
    __syncthreads();
    mark(a, tile, head, first, marks);
    __syncthreads();
    const int begin = warp * kWarpBlocks;
    const int stop = min(begin + kWarpBlocks, end - first);
    int mine = 0;
    for (int i = begin + lane; i < stop; i += 32) mine += marks[i] != 0 ? 1 : 0;
    mine = __reduce_add_sync(0xffffffff, mine);
    if (lane == 0) counted[warp] = mine;
    __syncthreads();
    int at = written;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) at += counted[w];
      written += counted[w];
    }
    for (int base = begin; base < stop; base += 32) {
      const std::uint32_t tokens = base + lane < stop ? marks[base + lane] : 0;
      const unsigned present = __ballot_sync(0xffffffff, tokens != 0);
      if (tokens != 0) {
        entries[at + __popc(present & ((1u << lane) - 1))] = {first + base + lane, tokens};
      }
      at += __popc(present);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) a.lists.counts[list] = written;
}

}  // namespace

UnionLists union_lists(const AttendParams& params, int tile_tokens) {
  UnionLists lists;
  lists.slots = tile_slots(params.batch, tile_tokens);
  lists.capacity = std::min<std::int64_t>(ceil_div(params.batch.max_kv_length, kPageTokens),
                                          std::int64_t{tile_tokens} * params.columns);
  return lists;
}

std::size_t union_bytes(const AttendParams& params, int tile_tokens) {
  const UnionLists lists = union_lists(params, tile_tokens);
  const std::int64_t count = params.pages.layout.kv_heads * lists.slots;
  ArenaSize size;
  size.take<UnionEntry>(count * lists.capacity);
  size.take<std::int32_t>(count);
  return size.bytes();
}

Result<UnionLists> build_union_lists(const Backend& backend, const AttendParams& params,
                                     int tile_tokens, Arena& arena) {
  UnionLists lists = union_lists(params, tile_tokens);
  const std::int64_t count = params.pages.layout.kv_heads * lists.slots;
  lists.entries = arena.take<UnionEntry>(count * lists.capacity);
  lists.counts = arena.take<std::int32_t>(count);
  const UnionArgs args{.batch = params.batch,
                       .selection = params.selection,
                       .columns = params.columns,
                       .tile_tokens = tile_tokens,
                       .lists = lists};
  const dim3 grid(static_cast<unsigned>(lists.slots),
                  static_cast<unsigned>(params.pages.layout.kv_heads));
  union_kernel<<<grid, kThreads, 0, device_of(backend).stream>>>(args);
  INFLLM_TRY(launched("attend"));
  return lists;
}

}  // namespace infllm::cuda::sm80
