// SPDX-License-Identifier: Apache-2.0
//
// The way there, in four kernels. target_kernel walks the keys twice: first for the maxima and sums
// of dense soft-max, in splits of the keys that the second pass adds up in their order, then for
// the masses of choosable blocks. score_kernel walks the pooled keys: the normaliser, then 64
// windows at a time, whose logits go through shared memory to be added up over the group. What a
// row needs of all its blocks at once, compare_kernel does, a warp a row.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "infllm/backend/cuda/align/align.h"
#include "infllm/backend/cuda/align/rows.cuh"
#include "infllm/backend/cuda/heads.h"
#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/shapes.cuh"
#include "infllm/core/arena.h"

namespace infllm::cuda::align {
namespace {

constexpr int kThreadBlocks = 256;  // about: splits of the keys make up for few rows
constexpr int kMostSplits = 64;
constexpr int kCompareWarps = 8;

struct ForwardArgs {
  AlignArgs a;
  float2* partials;  // [splits, Hkv, R, G] maximum and sum
  float* scores;     // [Hkv, R, N] R
  float* loss;       // [Hkv, R]
  int splits;
};

// Maximum and sum of the lane's four rows over what it has seen; of whole rows after finish().
struct RunningSums {
  __device__ RunningSums() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      m[i] = kNoMaximum;
      l[i] = 0;
    }
  }
  // Takes 64 logits a row; those at or after limit[i] are none.
  __device__ void take(const float (&s)[2][8][4], const int (&limit)[4], float c,
                       const LaneRows& at) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float top = m[i];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (at.column(n) + e < limit[i]) top = fmaxf(top, s[i / 2][n][i % 2 * 2 + e] * c);
        }
      }
      l[i] *= tile::fast_exp2(m[i] - top);
      m[i] = top;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float x = fmaf(s[i / 2][n][i % 2 * 2 + e], c, -top);
          if (at.column(n) + e < limit[i]) l[i] += tile::fast_exp2(x);
        }
      }
    }
  }
  // Over the four lanes of a row.
  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float top = fmaxf(m[i], __shfl_xor_sync(0xffffffff, m[i], 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
      l[i] *= tile::fast_exp2(m[i] - top);
      m[i] = top;
      l[i] += __shfl_xor_sync(0xffffffff, l[i], 1);
      l[i] += __shfl_xor_sync(0xffffffff, l[i], 2);
    }
  }
  float m[4];
  float l[4];
};

template <int D>
struct TargetShared {
  std::byte q[kTileRows * 2 * D];
  std::byte k[2][kTileKeys * 2 * D];
  RowPlace places[kTileRows];
  float sums[kTileRows];
};

// Block (x, y, z): a tile of entries, KV head y, part z of the blocks. kMass: the second pass.
template <typename T, int D, bool kMass>
__global__ void __launch_bounds__(kThreads) target_kernel(const __grid_constant__ ForwardArgs f) {
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<TargetShared<D>*>(memory);
  const AlignArgs& a = f.a;
  const EntryTile tile(a, static_cast<int>(blockIdx.x));
  const int head = static_cast<int>(blockIdx.y);
  const LaneRows at;
  load_places(a, tile, shared.places);
  __syncthreads();
  load_queries<T, D>(a, tile, shared.places, a.q, head, shared.q);
  tile::cp_async_commit();

  const std::int64_t planes = std::int64_t{a.num_rows} * a.group;
  const std::int64_t first_row =
      head * planes + std::int64_t{tile.first} * a.group;  // of one split
  const int rows = tile.entries * a.group;
  RunningSums sums;
  float inverse[4];
  if constexpr (kMass) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = min(at.row(i), rows - 1);
      float l = 0;
      for (int z = 0; z < f.splits; ++z) {
        const float2 part = f.partials[z * a.pool.map.heads * planes + first_row + row];
        const float top = fmaxf(sums.m[i], part.x);
        l = l * tile::fast_exp2(sums.m[i] - top) + part.y * tile::fast_exp2(part.x - top);
        sums.m[i] = top;
      }
      inverse[i] = l > 0 ? 1 / l : 0;
    }
  }

  for (Visit visit = next_visit(shared.places, tile, -1); visit.sequence >= 0;
       visit = next_visit(shared.places, tile, visit.sequence)) {
    const Sequence sequence(a.batch, visit.sequence);
    const int begin = kMass ? a.init_blocks : 0;
    const int end = kMass ? visit.end_block : (visit.length + kPageTokens - 1) / kPageTokens;
    const int part = (end - begin + f.splits - 1) / f.splits;
    const int first = begin + static_cast<int>(blockIdx.z) * part;
    const int last = min(end, first + part);
    const auto load_block = [&](int block) {
      if (block < last) {
        const int page = sequence.page(block, a.pool.num_pages);
        SmemTile<D>::template load<kTileKeys, kThreads>(
            shared.k[block % 2], a.pool.plane<const std::byte>(max(page, 0), a.pool.map.key(head)),
            page < 0 ? 0 : sequence.length - block * kPageTokens);
      }
      tile::cp_async_commit();
    };
    load_block(first);
    for (int block = first; block < last; ++block) {
      tile::cp_async_wait<0>();
      __syncthreads();  // the block has arrived, and the one before is done with
      load_block(block + 1);
      float s[2][8][4];
      sm80::multiply_transposed<T, D>(s, shared.q, at.warp * kWarpRows, shared.k[block % 2], 0,
                                      at.lane);
      const bool is_there = sequence.page(block, a.pool.num_pages) >= 0;
      if constexpr (!kMass) {
        int limit[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int entry = at.row(i) / a.group;
          const bool takes_part =
              is_there && entry < tile.entries && shared.places[entry].sequence == visit.sequence;
          limit[i] = takes_part ? shared.places[entry].position + 1 - block * kPageTokens : 0;
        }
        sums.take(s, limit, a.c, at);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float sum = 0;
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            sum += tile::fast_exp2(fmaf(s[i / 2][n][i % 2 * 2], a.c, -sums.m[i]));
            sum += tile::fast_exp2(fmaf(s[i / 2][n][i % 2 * 2 + 1], a.c, -sums.m[i]));
          }
          sum += __shfl_xor_sync(0xffffffff, sum, 1);
          sum += __shfl_xor_sync(0xffffffff, sum, 2);
          if ((at.lane & 3) == 0) shared.sums[at.row(i)] = is_there ? sum * inverse[i] : 0;
        }
        __syncthreads();
        const int entry = static_cast<int>(threadIdx.x);
        if (entry < tile.entries && shared.places[entry].sequence == visit.sequence &&
            block < shared.places[entry].end_block) {
          float mass = 0;
          for (int h = 0; h < a.group; ++h) mass += shared.sums[entry * a.group + h];
          const std::int64_t row = std::int64_t{head} * a.num_rows + tile.first + entry;
          a.grad_scores[row * a.blocks + block] = mass / static_cast<float>(a.group);
        }
      }
    }
    tile::cp_async_wait<0>();
    __syncthreads();  // before the next sequence's keys
  }
  if constexpr (!kMass) {
    sums.finish();
    float2* out = f.partials + blockIdx.z * a.pool.map.heads * planes + first_row;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((at.lane & 3) == 0 && at.row(i) < rows) out[at.row(i)] = {sums.m[i], sums.l[i]};
    }
  }
}

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
    const int begin = max(0, a.init_blocks * kFineRows - 1) / kTileKeys * kTileKeys;
    const int end = min(visit.end_block * kFineRows, fine.count(visit.length));
    for_each_tile<D>(
        a, sequence, fine, begin, end, shared.k, [&](int first, const std::byte* keys) {
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
            float top = y[0];
            for (int h = 1; h < a.group; ++h) top = fmaxf(top, y[h * kScoreStride]);
            float sum = 0;
            for (int h = 0; h < a.group; ++h) sum += tile::fast_exp2(y[h * kScoreStride] - top);
            const bool is_visible =
                first + i % kTileKeys < fine.count(shared.places[entry].position + 1);
            y[0] = is_visible ? top + log2f(sum) : -INFINITY;
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

template <typename T, int D>
Status launch(cudaStream_t stream, const ForwardArgs& args) {
  const auto tiles = static_cast<unsigned>(tiles_of(args.a));
  const auto heads = static_cast<unsigned>(args.a.pool.map.heads);
  const dim3 split_grid(tiles, heads, static_cast<unsigned>(args.splits));
  constexpr int kTargetBytes = sizeof(TargetShared<D>);
  INFLLM_TRY(
      start("align", target_kernel<T, D, false>, split_grid, kThreads, kTargetBytes, stream, args));
  INFLLM_TRY(
      start("align", target_kernel<T, D, true>, split_grid, kThreads, kTargetBytes, stream, args));
  INFLLM_TRY(start("align", score_kernel<T, D>, dim3(tiles, heads), kThreads,
                   sizeof(ScoreShared<D>), stream, args));
  const std::int64_t rows = std::int64_t{args.a.num_rows} * heads;
  return start("align", compare_kernel,
               static_cast<unsigned>(ceil_div(rows, std::int64_t{kCompareWarps})),
               kCompareWarps * 32, 0, stream, args);
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
  return with_shape(params.pages.layout,
                    [&]<typename T, int D>() { return launch<T, D>(stream, args); });
}

std::size_t align_bytes(const Backend&, const AlignParams& params) {
  ArenaSize size;
  size.take<RowPlace>(params.num_rows);
  size.take<float2>(partials_of(params));
  size.take<float>(scores_of(params));
  return size.bytes();
}

}  // namespace infllm::cuda::align
