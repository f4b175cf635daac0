// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/align/forward.cuh"
#include "infllm/backend/cuda/align/sums.cuh"
#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/shapes.cuh"

namespace infllm::cuda::align {
namespace {

template <int D>
struct ScoreShared {
  std::byte q[kTileRows * 2 * D];
  std::byte k[2][kTileKeys * 2 * D];
  float y[kTileRows * kScoreStride];
  float last[kTileRows];  // of an entry: the score of the window before the tile's first
  RowPlace places[kTileRows];
};

// Block (x, y): a tile of entries, KV head y.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads) score_kernel(const __grid_constant__ ForwardArgs f) {
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<ScoreShared<D>*>(memory);
  const AlignArgs& a = f.a;
  const EntryTile tile(a, static_cast<int>(blockIdx.x));
  const int head = static_cast<int>(blockIdx.y);
  const LaneRows at;
  load_places(a, tile, shared.places);
  __syncthreads();
  load_queries<T, D>(a, tile, shared.places, a.q_score, head, shared.q);
  tile::cp_async_commit();

  for (Visit visit = next_visit(shared.places, tile, -1); visit.sequence >= 0;
       visit = next_visit(shared.places, tile, visit.sequence)) {
    const Sequence sequence(a.batch, visit.sequence);
    const auto takes_part = [&](int entry) {
      return entry < tile.entries && shared.places[entry].sequence == visit.sequence;
    };
    const Pooled norm_keys = normaliser(a, head);
    RunningSums sums;
    for_each_tile<D>(
        a, sequence, norm_keys, 0, norm_keys.count(visit.length), shared.k,
        [&](int first, const std::byte* keys) {
          float s[2][8][4];
          sm80::multiply_transposed<T, D>(s, shared.q, at.warp * kWarpRows, keys, 0, at.lane);
          int limit[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int entry = at.row(i) / a.group;
            limit[i] =
                takes_part(entry) ? norm_keys.count(shared.places[entry].position + 1) - first : 0;
          }
          sums.take(s, limit, a.c, at);
        });
    sums.finish();
    float norm[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      norm[i] = sums.l[i] > 0 ? sums.m[i] + log2f(sums.l[i]) : 0;
      const int entry = at.row(i) / a.group;
      if ((at.lane & 3) == 0 && takes_part(entry)) {
        const std::int64_t query = head * a.group + at.row(i) - entry * a.group;
        a.norms[query * a.num_rows + tile.first + entry] = norm[i] * kLn2;
      }
    }

    const Pooled fine(a, false, head);
    const WindowRange range(a, fine, visit);
    for_each_tile<D>(
        a, sequence, fine, range.begin, range.end, shared.k, [&](int first, const std::byte* keys) {
          float s[2][8][4];
          sm80::multiply_transposed<T, D>(s, shared.q, at.warp * kWarpRows, keys, 0, at.lane);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float* y = shared.y + at.row(i) * kScoreStride;
#pragma unroll
            for (int n = 0; n < 8; ++n) {
              y[at.column(n)] = fmaf(s[i / 2][n][i % 2 * 2], a.c, -norm[i]);
              y[at.column(n) + 1] = fmaf(s[i / 2][n][i % 2 * 2 + 1], a.c, -norm[i]);
            }
          }
          __syncthreads();
          for (int i = static_cast<int>(threadIdx.x); i < tile.entries * kTileKeys; i += kThreads) {
            const int entry = i / kTileKeys;
            if (!takes_part(entry)) continue;
            float* y = shared.y + entry * a.group * kScoreStride + i % kTileKeys;
            const GroupSum sum(y, a.group);
            const bool is_visible =
                first + i % kTileKeys < fine.count(shared.places[entry].position + 1);
            y[0] = is_visible ? sum.log() : -INFINITY;
          }
          __syncthreads();
          for (int i = static_cast<int>(threadIdx.x); i < tile.entries * kTileBlocks;
               i += kThreads) {
            const int entry = i / kTileBlocks;
            const int block = first / kFineRows + i % kTileBlocks;
            if (!takes_part(entry) || block < a.init_blocks ||
                block >= shared.places[entry].end_block) {
              continue;
            }
            const float* y =
                shared.y + entry * a.group * kScoreStride + i % kTileBlocks * kFineRows;
            float best = block == 0 ? -INFINITY : i % kTileBlocks == 0 ? shared.last[entry] : y[-1];
            int window = block * kFineRows - 1;
            for (int w = 0; w < kFineRows; ++w) {
              if (!(y[w] > best)) continue;
              best = y[w];
              window = block * kFineRows + w;
            }
            const std::int64_t row = std::int64_t{head} * a.num_rows + tile.first + entry;
            f.scores[row * a.blocks + block] = best;
            a.windows[row * a.blocks + block] = window;
          }
          __syncthreads();
          for (int e = static_cast<int>(threadIdx.x); e < tile.entries; e += kThreads) {
            shared.last[e] = shared.y[e * a.group * kScoreStride + kTileKeys - 1];
          }
          // The next tile's first barrier comes before anybody writes y again.
        });
  }
}

}  // namespace

Status score_blocks(const KvLayout& layout, cudaStream_t stream, const ForwardArgs& args) {
  const dim3 grid(static_cast<unsigned>(tiles_of(args.a)),
                  static_cast<unsigned>(args.a.pool.map.heads));
  return with_shape(layout, [&]<typename T, int D>() {
    return start("align", score_kernel<T, D>, grid, kThreads, sizeof(ScoreShared<D>), stream, args);
  });
}

}  // namespace infllm::cuda::align
