// SPDX-License-Identifier: Apache-2.0
#include <string>

#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/pooled.h"
#include "infllm/backend/cuda/shapes.cuh"
#include "infllm/backend/cuda/sm90/score_kernel.cuh"
#include "infllm/backend/cuda/sm90/score_select.h"
#include "infllm/backend/cuda/sm90/tensor_maps.h"

namespace infllm::cuda::sm90 {
namespace {

// [planes][rows][D] as [planes][D / 64][rows][64].
Result<CUtensorMap> key_map(const ScoreParams& p, const void* keys, std::int64_t planes,
                            std::int64_t rows) {
  const auto dim = static_cast<std::uint64_t>(p.pages.layout.head_dim);
  const std::uint64_t bytes = dim * 2;
  const auto count = static_cast<std::uint64_t>(rows);
  return tile::make_tensor_map(
      {.data = keys,
       .dtype = p.pages.layout.dtype,
       .rank = 4,
       .size = {kPanel, count, dim / kPanel, static_cast<std::uint64_t>(planes)},
       .stride_bytes = {bytes, 2 * kPanel, count * bytes},
       .box = {kPanel, kTileKeys, static_cast<std::uint32_t>(dim / kPanel), 1}});
}

template <typename Shape>
Status launch_shape(const Device& device, const ScoreSelectParams& params, const PooledSizes& sizes,
                    const PooledKeys& keys) {
  const ScoreParams& p = params.score;
  ScoreMaps maps;
  maps.queries = INFLLM_TRY(rows_map(p.pages.layout, p.heads_q, p.batch.num_tokens, p.q,
                                     Shape::kGroupTokens, Shape::kPanels));
  // Where there are no windows, no token is scored and the map is not used.
  maps.fine = maps.coarse = maps.queries;
  if (sizes.fine_rows > 0) {
    maps.fine = INFLLM_TRY(key_map(p, keys.fine, sizes.planes, sizes.fine_rows));
  }
  if (sizes.coarse_rows > 0) {
    maps.coarse = INFLLM_TRY(key_map(p, keys.coarse, sizes.planes, sizes.coarse_rows));
  }
  const int heads_kv = p.pages.layout.kv_heads;
  const ScoreTask task{.batch = p.batch,
                       .heads_kv = heads_kv,
                       .columns = params.select.columns(),
                       .init_blocks = p.config.init_blocks,
                       .local_blocks = p.config.local_blocks(),
                       .fine_normaliser = p.config.lse_source == LseSource::kFine,
                       .exponent = exponent_of(p.scale),
                       .selection = params.select.selection,
                       .items = count_items(p.batch, heads_kv, Shape::kTokens)};
  constexpr std::size_t kShared = sizeof(ScoreMemory<Shape>);
  static_assert(kShared <= kSharedLimit);
  const auto grid = static_cast<unsigned>(std::min<std::int64_t>(task.items, device.sm_count));
  return start("score_select", score_select_kernel<Shape>, grid, Shape::kThreads, kShared,
               device.stream, maps, task);
}

// Calls run(ScoreShape) with the shape's constants.
template <typename Run>
Status with_score_shape(const ScoreSelectParams& params, Run&& run) {
  const ScoreParams& p = params.score;
  const int group = p.heads_q / p.pages.layout.kv_heads;
  const bool rounded = p.config.score_rounding == ScoreRounding::kBF16;
  const auto with_key = [&]<typename Element, int kHeadDim, int kGroup>() -> Status {
    if (rounded) return run(ScoreShape<Element, kHeadDim, kGroup, RoundedKey>());
    if constexpr (kGroup > 2) return run(ScoreShape<Element, kHeadDim, kGroup, ExactKey>());
    return unsupported("score_select: groups of 2 heads need rounded scores");
  };
  const auto with_group = [&]<typename Element, int kHeadDim>() -> Status {
    if (group == 16) return with_key.template operator()<Element, kHeadDim, 16>();
    if (group == 8) return with_key.template operator()<Element, kHeadDim, 8>();
    if (group == 4) return with_key.template operator()<Element, kHeadDim, 4>();
    if (group == 2) return with_key.template operator()<Element, kHeadDim, 2>();
    return unsupported("score_select: groups of " + std::to_string(group) +
                       " heads; expected 2, 4, 8 or 16");
  };
  return with_shape(p.pages.layout, with_group);
}

}  // namespace

bool score_selects(const Backend&, const ScoreSelectParams& params) {
  const ScoreParams& p = params.score;
  const std::int32_t dim = p.pages.layout.head_dim;
  const std::int32_t group = p.heads_q / p.pages.layout.kv_heads;
  const bool rounded = p.config.score_rounding == ScoreRounding::kBF16;
  return p.batch.max_query_length > 1 && (dim == 64 || dim == 128) && p.config.local_blocks() > 0 &&
         (group == 16 || group == 8 || group == 4 || (group == 2 && rounded)) &&
         p.config.topk <= kMostWanted && params.select.blocks() <= kMostBlocks;
}

Status score_select(const Backend& backend, const ScoreSelectParams& params,
                    std::span<std::byte> workspace) {
  const Device& device = device_of(backend);
  const PooledSizes sizes(params.score);
  Arena arena(workspace);
  const PooledKeys keys = carve(sizes, arena);
  INFLLM_TRY(gather_pooled(backend, params.score, keys));
  return with_score_shape(params, [&]<typename Shape>(Shape) {
    return launch_shape<Shape>(device, params, sizes, keys);
  });
}

std::size_t score_select_bytes(const Backend&, const ScoreSelectParams& params) {
  return PooledSizes(params.score).bytes();
}

}  // namespace infllm::cuda::sm90
