// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>

#include "infllm/backend/cuda/shapes.cuh"
#include "infllm/backend/cuda/sm90/attend_backward_dense.cuh"
#include "infllm/backend/cuda/sm90/attend_backward_launch.cuh"

namespace infllm::cuda::sm90 {
namespace {

// The Q, dO and sums of dQ of a chunk should stay in L2, 64 KB a tile for D = 128, for the KV heads
// that are walked together: with two of them, twice the time may pass until a turn is passed on.
constexpr int kHeadsTogether = 2;
constexpr std::int64_t kTilesTogether = 512;
// Of chunks. Short sequences are cut finer, so that there is work for all multiprocessors.
constexpr std::int64_t kSmallestChunk = 64;
constexpr std::int64_t kChunksWanted = 8;
// The sums of dQ are the workspace. Longer batches are cut into several launches.
constexpr std::int64_t kQuerySumBytes = std::int64_t{1} << 30;

// How a call is cut.
struct DensePlan {
  explicit DensePlan(const AttendParams& p)
      : heads(p.pages.layout.kv_heads),
        group(p.heads_q / heads),
        sum_floats(std::int64_t{kPageTokens} * p.pages.layout.head_dim),
        sequences(p.batch.num_sequences),
        pairs(ceil_div(p.batch.max_kv_length, 2 * kPageTokens)),
        heads_together(std::min<std::int64_t>(heads, kHeadsTogether)),
        chunk_tiles(std::clamp(static_cast<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(
                                   p.batch.num_tokens / (64 / group) / kChunksWanted))),
                               kSmallestChunk, kTilesTogether / heads_together)),
        chunks(ceil_div(p.batch.max_query_length, chunk_tiles * (64 / group))),
        blocks(sequences * heads * pairs * 2) {
    const std::int64_t all = p.batch.num_tokens / (64 / group) + sequences;
    const std::int64_t most =
        std::max<std::int64_t>(1, kQuerySumBytes / (heads * sum_floats * std::int64_t{4}));
    chunks_at_once = chunks;
    slots = all;
    if (all > most) {
      chunks_at_once = std::clamp<std::int64_t>(most / (sequences * chunk_tiles), 1, chunks);
      slot_stride = chunks_at_once * chunk_tiles;
      slots = sequences * slot_stride;
      if (slots >= all) chunks_at_once = chunks, slot_stride = 0, slots = all;
    }
    launches = chunks == 0 ? 0 : ceil_div(chunks, chunks_at_once);
  }

  template <class Taker>
  void take(Taker&& taker, DenseArgs& a) const {
    taker(a.keys.sums, blocks * 2 * sum_floats);
    taker(a.query_sums, heads * slots * sum_floats);
    taker(a.key_turns, blocks);
    taker(a.query_turns, heads * slots);
    taker(a.next, std::int64_t{1});
  }

  // Thread blocks of all launches, most of which find nothing to do if lengths differ much.
  std::int64_t items() const { return chunks * sequences * heads * pairs; }

  std::int64_t heads;
  std::int64_t group;
  std::int64_t sum_floats;  // of 64 keys or rows
  std::int64_t sequences;
  std::int64_t pairs;  // of blocks
  std::int64_t heads_together;
  std::int64_t chunk_tiles;
  std::int64_t chunks;  // of a sequence
  std::int64_t blocks;  // of 64 keys
  std::int64_t chunks_at_once = 0;
  std::int64_t slots = 0;
  std::int64_t slot_stride = 0;
  std::int64_t launches = 0;
};

template <class C>
Status run(const Device& device, const AttendBackwardParams& p, const DensePlan& plan,
           DenseArgs args) {
  const cudaStream_t stream = device.stream;
  const auto clear = [&](unsigned* words, std::int64_t count) {
    return to_status("attend_backward",
                     cudaMemsetAsync(words, 0, count * sizeof(unsigned), stream));
  };
  if (plan.launches > 0) {
    const KeyMaps maps = INFLLM_TRY(key_maps<C>(p, args.keys));
    INFLLM_TRY(clear(args.key_turns, plan.blocks));
    for (std::int64_t i = 0; i < plan.launches; ++i) {
      args.first_chunk = static_cast<std::int32_t>(i * plan.chunks_at_once);
      const auto chunks = std::min(plan.chunks_at_once, plan.chunks - args.first_chunk);
      INFLLM_TRY(clear(args.query_turns, plan.heads * plan.slots));
      INFLLM_TRY(clear(args.next, 1));
      const auto items = chunks * plan.sequences * plan.heads * plan.pairs;
      INFLLM_TRY(
          (start_keys<C, DenseShared<C>>(dense_gradient_kernel<C>, items, stream, maps, args)));
      const dim3 tiles(static_cast<unsigned>(chunks * plan.chunk_tiles),
                       static_cast<unsigned>(plan.sequences), static_cast<unsigned>(plan.heads));
      round_queries_kernel<C><<<tiles, 128, 0, stream>>>(args);
      INFLLM_TRY(launched("attend_backward"));
    }
  }
  round_keys_kernel<C><<<dim3(static_cast<unsigned>(plan.blocks), 2), 128, 0, stream>>>(args);
  return launched("attend_backward");
}

}  // namespace

bool suits_dense_gradient(const AttendParams& forward) {
  constexpr std::int64_t kFew = 4096;  // take no time
  const DensePlan plan(forward);
  // If all tokens were one sequence's.
  const std::int64_t together =
      plan.heads * plan.pairs *
      ceil_div(forward.batch.num_tokens, plan.chunk_tiles * (64 / plan.group));
  return plan.items() <= std::max(kFew, 4 * together);
}

Status dense_gradient(const Backend& backend, const AttendBackwardParams& params,
                      const RowStatistics* stats, std::span<std::byte> workspace) {
  const AttendParams& forward = params.forward;
  const DensePlan plan(forward);
  DenseArgs args{.keys = key_args(params, stats),
                 .query_sums = nullptr,
                 .query_turns = nullptr,
                 .key_turns = nullptr,
                 .next = nullptr,
                 .grad_q = params.grad_q,
                 .pairs = static_cast<std::int32_t>(plan.pairs),
                 .heads_together = static_cast<std::int32_t>(plan.heads_together),
                 .chunk_tiles = static_cast<std::int32_t>(plan.chunk_tiles),
                 .first_chunk = 0,
                 .slots = static_cast<std::int32_t>(plan.slots),
                 .slot_stride = static_cast<std::int32_t>(plan.slot_stride)};
  args.keys.batch.any_sparse = false;
  Arena arena(workspace);
  plan.take([&]<typename T>(T*& array, std::int64_t count) { array = arena.take<T>(count); }, args);
  return with_shape(forward.pages.layout, [&]<typename T, int kDim>() {
    return run<KeyConfig<T, kDim, false>>(device_of(backend), params, plan, args);
  });
}

std::size_t dense_gradient_bytes(const AttendBackwardParams& params) {
  ArenaSize size;
  DenseArgs args{.keys = {.pool = PagePool(params.forward.pages)}};
  DensePlan(params.forward)
      .take([&]<typename T>(T*&, std::int64_t count) { size.take<T>(count); }, args);
  return size.bytes();
}

}  // namespace infllm::cuda::sm90
