// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/align/align.h"
#include "infllm/backend/cuda/align/forward.cuh"
#include "infllm/backend/cuda/heads.h"
#include "infllm/backend/cuda/launch.cuh"
#include "infllm/core/arena.h"

namespace infllm::cuda::align {
namespace {

constexpr int kThreadBlocks = 256;  // about: splits of the keys make up for few rows
constexpr int kMostSplits = 64;
constexpr int kCompareWarps = 8;

// The butterfly adds in an order of its own, the same each time.
template <typename Combine>
__device__ float over_warp(float x, Combine&& combine) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    x = combine(x, __shfl_xor_sync(0xffffffff, x, step));
  }
  return x;
}

// A warp an entry and KV head: soft-max over blocks, the loss, and what is outside of F.
__global__ void __launch_bounds__(kCompareWarps * 32)
    compare_kernel(const __grid_constant__ ForwardArgs f) {
  const AlignArgs& a = f.a;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t row =
      std::int64_t{blockIdx.x} * kCompareWarps + static_cast<int>(threadIdx.x) / 32;
  if (row >= std::int64_t{a.num_rows} * a.pool.map.heads) return;
  const std::int64_t r = row % a.num_rows;
  const std::int64_t head = row / a.num_rows;
  const RowPlace place = a.places[r];
  const bool is_row = place.sequence >= 0;
  const int first = is_row ? a.init_blocks : 0;
  const int end = is_row ? place.end_block : 0;
  const float* scores = f.scores + row * a.blocks;
  float* grads = a.grad_scores + row * a.blocks;
  std::int32_t* windows = a.windows + row * a.blocks;

  const auto larger = [](float x, float y) { return fmaxf(x, y); };
  const auto added = [](float x, float y) { return x + y; };
  float top = -INFINITY;
  for (int b = first + lane; b < end; b += 32) top = fmaxf(top, scores[b]);
  top = over_warp(top, larger);
  float sum = 0;
  float mass = 0;
  for (int b = first + lane; b < end; b += 32) {
    sum += tile::fast_exp2(scores[b] - top);
    mass += grads[b];
  }
  sum = over_warp(sum, added);
  mass = over_warp(mass, added);
  const float norm = log2f(sum);
  float loss = 0;
  for (int b = lane; b < a.blocks; b += 32) {
    if (b < first || b >= end) {
      grads[b] = 0;
      windows[b] = -1;
      continue;
    }
    const float target = grads[b];
    loss -= target * (scores[b] - top - norm) * kLn2;
    grads[b] = tile::fast_exp2(scores[b] - top) / sum * mass - target;
  }
  loss = over_warp(loss, added);
  if (lane == 0) f.loss[row] = loss;
  for (int h = lane; !is_row && h < a.group; h += 32) {
    a.norms[(head * a.group + h) * a.num_rows + r] = 0;
  }
}

int splits_of(const AlignParams& p) {
  const std::int64_t group = p.heads_q / p.pages.layout.kv_heads;
  const std::int64_t tiles =
      ceil_div(p.num_rows, std::max<std::int64_t>(1, kTileRows / group)) * p.pages.layout.kv_heads;
  const std::int64_t blocks = p.config.blocks_in(p.batch.max_kv_length);
  return static_cast<int>(
      std::clamp<std::int64_t>(kThreadBlocks / std::max<std::int64_t>(1, tiles), 1,
                               std::clamp<std::int64_t>(blocks / 8, 1, kMostSplits)));
}

std::int64_t partials_of(const AlignParams& p) {
  return std::int64_t{p.num_rows} * p.heads_q * splits_of(p);
}
std::int64_t scores_of(const AlignParams& p) {
  return p.num_rows * p.pages.layout.kv_heads * p.config.blocks_in(p.batch.max_kv_length);
}

}  // namespace

Status align(const Backend& backend, const AlignParams& params, std::span<std::byte> workspace) {
  INFLLM_TRY(check_heads("align", params.pages.layout, params.heads_q, kTileRows));
  Arena arena(workspace);
  auto* places = arena.take<RowPlace>(params.num_rows);
  const ForwardArgs args{.a = align_args(params, places),
                         .partials = arena.take<float2>(partials_of(params)),
                         .scores = arena.take<float>(scores_of(params)),
                         .loss = static_cast<float*>(params.loss),
                         .splits = splits_of(params)};
  const cudaStream_t stream = device_of(backend).stream;
  INFLLM_TRY(find_places(backend, "align", args.a));
  INFLLM_TRY(find_target(params.pages.layout, stream, args));
  INFLLM_TRY(score_blocks(params.pages.layout, stream, args));
  const std::int64_t rows = std::int64_t{args.a.num_rows} * args.a.pool.map.heads;
  return start("align", compare_kernel,
               static_cast<unsigned>(ceil_div(rows, std::int64_t{kCompareWarps})),
               kCompareWarps * 32, 0, stream, args);
}

std::size_t align_bytes(const Backend&, const AlignParams& params) {
  ArenaSize size;
  size.take<RowPlace>(params.num_rows);
  size.take<float2>(partials_of(params));
  size.take<float>(scores_of(params));
  return size.bytes();
}

}  // namespace infllm::cuda::align
