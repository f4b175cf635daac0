// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/align/rows.cuh"
#include "infllm/backend/cuda/device.h"

namespace infllm::cuda::align {
namespace {

// One thread an entry.
__global__ void __launch_bounds__(kThreads) place_kernel(AlignArgs a) {
  const int r = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (r >= a.num_rows) return;
  RowPlace place{a.rows == nullptr ? r : a.rows[r], -1, 0, 0};
  if (place.token >= 0 && place.token < a.batch.num_tokens) {
    // The last sequence that begins at or before the token: empty ones come first.
    int low = 0;
    int high = a.batch.num_sequences;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (a.batch.query_start[middle] <= place.token ? low : high) = middle;
    }
    place.position = a.batch.kv_length[low] - (a.batch.query_start[low + 1] - place.token);
    place.end_block = place.position / kPageTokens - a.local_blocks + 1;
    // A window begins in every block before the own one and ends before its end.
    if (place.end_block > a.init_blocks) place.sequence = low;
  }
  a.places[r] = place;
}

}  // namespace

AlignArgs align_args(const AlignParams& p, RowPlace* places) {
  const int group = p.heads_q / p.pages.layout.kv_heads;
  return {.pool = PagePool(p.pages),
          .batch = p.batch,
          .q = p.q,
          .q_score = p.config.use_nope ? p.q_score : p.q,
          .rows = p.rows,
          .places = places,
          .norms = static_cast<float*>(p.norms),
          .grad_scores = static_cast<float*>(p.grad_scores),
          .windows = p.windows,
          .num_rows = p.num_rows,
          .heads_q = p.heads_q,
          .group = group,
          .tile_entries = kTileRows / group,
          .blocks = static_cast<int>(p.config.blocks_in(p.batch.max_kv_length)),
          .init_blocks = p.config.init_blocks,
          .local_blocks = p.config.local_blocks(),
          .from_coarse = p.config.lse_source == LseSource::kCoarse,
          .scale = p.scale,
          .c = exponent_of(p.scale)};
}

Status find_places(const Backend& backend, std::string_view step, const AlignArgs& args) {
  const auto blocks = static_cast<unsigned>(ceil_div(args.num_rows, kThreads));
  place_kernel<<<blocks, kThreads, 0, device_of(backend).stream>>>(args);
  return launched(step);
}

}  // namespace infllm::cuda::align
