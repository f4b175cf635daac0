// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "infllm/backend/cuda/decode/pooled_tile.cuh"
#include "infllm/backend/cuda/decode/row.cuh"
#include "infllm/backend/cuda/decode/score_select.h"
#include "infllm/backend/cuda/decode/top_blocks.cuh"
#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/core/arena.h"

namespace infllm::cuda::decode {
namespace {

// Of a thread block, by tiles of 8 heads: as many as the queries leave registers for.
constexpr int threads_of(int tiles) { return tiles <= 2 ? 512 : 256; }
constexpr int kMaxParts = 32;
constexpr int kLargestCluster = 16;
constexpr int kPortableCluster = 8;
constexpr int kMaxGroup = 32;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = __builtin_huge_valf();

enum Phase : int { kNormalise = 1, kScore = 2, kSelect = 4, kAllPhases = 7 };

struct Args {
  PagePool pool;
  Batch batch;
  const void* q;
  std::int32_t* selection;
  float2* normalisers;  // [rows][parts][heads of the tiles]: maximum and sum, in powers of 2
  BlockKeys* keys;      // [rows][key_stride]
  int key_stride;
  int heads_q;
  float scale;  // to logits in powers of 2
  int init_blocks;
  int local_blocks;
  int columns;
  bool fine_normaliser;
  bool to_bf16;
  int phases;
};

template <int kTiles>
struct Shared {
  float2 normalisers[threads_of(kTiles) / 32][8 * kTiles];
  float lse[8 * kTiles];
  TopBlocksShared<threads_of(kTiles)> select;
};

// Two soft-max statistics as one; {-inf, 0} is none.
__device__ __forceinline__ float2 merge(float2 a, float2 b) {
  const float top = fmaxf(a.x, b.x);
  if (top == -kInfinity) return a;
  return {top, a.y * tile::fast_exp2(a.x - top) + b.y * tile::fast_exp2(b.x - top)};
}

template <int kFirst, int kEnd>
__device__ __forceinline__ float2 merge_lanes(float2 a) {
#pragma unroll
  for (int step = kFirst; step < kEnd; step *= 2) {
    a = merge(a, {__shfl_xor_sync(kAllLanes, a.x, step), __shfl_xor_sync(kAllLanes, a.y, step)});
  }
  return a;
}

// One part of one row.
template <typename T, int kDim, int kTiles>
class Part {
 public:
  static constexpr int kHeads = 8 * kTiles;
  static constexpr int kThreads = threads_of(kTiles);
  static constexpr int kWarps = kThreads / 32;
  using Tile = KeyTile<T, kDim, kTiles>;

  __device__ Part(const Args& args, const Sequence& sequence, int length, Shared<kTiles>& shared)
      : a_(args),
        sequence_(sequence),
        shared_(shared),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        head_kv_(static_cast<int>(blockIdx.y)),
        group_(args.heads_q / args.pool.map.heads),
        row_(static_cast<std::int64_t>(blockIdx.z) * args.pool.map.heads + head_kv_),
        own_((length - 1) / kPageTokens),
        forced_(own_, args.init_blocks, args.local_blocks, args.columns),
        length_(length),
        fine_(plane(true)) {}

  __device__ __forceinline__ void run() {
    const int parts = static_cast<int>(gridDim.x);
    const int part = static_cast<int>(blockIdx.x);
    if (forced_.free == 0) {  // nothing to score
      if ((a_.phases & kSelect) != 0 && part == 0) select();
      return;
    }
    if ((a_.phases & (kNormalise | kScore)) != 0) {
      const T* q = static_cast<const T*>(a_.q) +
                   (std::int64_t{sequence_.first_token} * a_.heads_q + head_kv_ * group_) * kDim;
      queries_.load(q, group_);
    }
    // Tiles of 16 fine windows, four blocks each, that candidates need.
    const int tiles = (candidates_end() + 3) / 4;
    const int first = share(tiles, part, parts) + warp_;
    const int end = share(tiles, part + 1, parts);

    Tile one, two;  // on their way while the normaliser is computed and exchanged
    if ((a_.phases & kScore) != 0) load(one, first, end);
    if ((a_.phases & kNormalise) != 0) {
      normalise(plane(a_.fine_normaliser), part, parts);
    }
    if ((a_.phases & kScore) != 0) load(two, first + kWarps, end);
    if (a_.phases == kAllPhases) wait_for_parts();
    if ((a_.phases & kScore) != 0) score(one, two, first, end, parts);
    if (a_.phases == kAllPhases) wait_for_parts();
    if ((a_.phases & kSelect) != 0 && part == 0) select();
  }

 private:
  __device__ __forceinline__ PooledPlane<T, kDim> plane(bool fine) const {
    return {fine ? a_.pool.map.fine(head_kv_) : a_.pool.map.coarse(head_kv_),
            fine ? kFineRows : kCoarseRows, fine ? fine_windows(length_) : coarse_windows(length_)};
  }

  // Blocks from here on are forced, or come after the token's own.
  __device__ __forceinline__ int candidates_end() const {
    return max(0, own_ + 1 - a_.local_blocks);
  }

  __device__ __forceinline__ void load(Tile& keys, int tile, int end) const {
    const int window = tile * kTileKeys + lane_ / 4;
    const bool inside = tile < end;
    keys.load(inside ? fine_.row(a_.pool, sequence_, window) : nullptr,
              inside ? fine_.row(a_.pool, sequence_, window + 8) : nullptr);
  }

  // Phase 1: this part's maximum and sum of every head.
  __device__ __forceinline__ void normalise(PooledPlane<T, kDim> plane, int part, int parts) {
    float2 sums[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) sums[t][0] = sums[t][1] = {-kInfinity, 0};
    const int tiles = (plane.end + kTileKeys - 1) / kTileKeys;
    const int end = share(tiles, part + 1, parts);
    for (int tile = share(tiles, part, parts) + warp_; tile < end; tile += kWarps) {
      const int window = tile * kTileKeys + lane_ / 4;
      Tile keys;
      keys.load(plane.row(a_.pool, sequence_, window), plane.row(a_.pool, sequence_, window + 8));
      float x[kTiles][4];
      keys.times(queries_, x);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            if (keys.exists[r]) {
              sums[t][j] = merge(sums[t][j], {x[t][2 * r + j] * a_.scale, 1.0f});
            }
          }
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float2 sum = merge_lanes<4, 32>(sums[t][j]);
        if (lane_ < 4) shared_.normalisers[warp_][8 * t + 2 * lane_ + j] = sum;
      }
    }
    __syncthreads();
    const int head = static_cast<int>(threadIdx.x);
    if (head < kHeads) {
      float2 sum = shared_.normalisers[0][head];
      for (int w = 1; w < kWarps; ++w) sum = merge(sum, shared_.normalisers[w][head]);
      a_.normalisers[(row_ * parts + part) * kHeads + head] = sum;
    }
  }

  // The logarithm of every head's sum over all parts; heads that do not exist, or that have nothing
  // to be normalised by, get +inf and so no weight.
  __device__ __forceinline__ void gather_normalisers(int parts) {
    for (int head = warp_; head < kHeads; head += kWarps) {
      float2 sum = {-kInfinity, 0};
      for (int p = lane_; p < parts; p += 32) {
        sum = merge(sum, __ldcg(a_.normalisers + (row_ * parts + p) * kHeads + head));
      }
      sum = merge_lanes<1, 32>(sum);
      if (lane_ == 0) {
        shared_.lse[head] = head < group_ && sum.y > 0 ? sum.x + __log2f(sum.y) : kInfinity;
      }
    }
    __syncthreads();
  }

  // Phase 2: the keys of all candidate blocks of this part. Two tiles are always in flight.
  __device__ __forceinline__ void score(Tile& one, Tile& two, int first, int end, int parts) {
    gather_normalisers(parts);
    float lse[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 2; ++j) lse[t][j] = shared_.lse[8 * t + 2 * (lane_ % 4) + j];
    }
    for (int tile = first; tile < end; tile += 2 * kWarps) {
      score_tile(one, tile, tile + 2 * kWarps, end, lse);
      if (tile + kWarps < end) score_tile(two, tile + kWarps, tile + 3 * kWarps, end, lse);
    }
  }

  // Uses up `keys`, of `tile`, and sends for those of `next` in their place.
  __device__ __forceinline__ void score_tile(Tile& keys, int tile, int next, int end,
                                             const float (&lse)[kTiles][2]) {
    float x[kTiles][4];
    keys.times(queries_, x);
    const bool exists[2] = {keys.exists[0], keys.exists[1]};
    load(keys, next, end);
    std::uint32_t last[2], best[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = 0;  // S of window lane / 4 + 8 r
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          sum += tile::fast_exp2(x[t][2 * r + j] * a_.scale - lse[t][j]);
        }
      }
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      last[r] = exists[r] ? sort_key(sum, a_.to_bf16) : 0;
      best[r] = max(last[r], __shfl_xor_sync(kAllLanes, last[r], 4));
      best[r] = max(best[r], __shfl_xor_sync(kAllLanes, best[r], 8));
    }
    if (lane_ % 16 == 12) {  // has the last window of two blocks
      BlockKeys* to = a_.keys + row_ * a_.key_stride + 4 * tile + lane_ / 16;
      to[0] = {best[0], last[0]};
      to[2] = {best[1], last[1]};
    }
  }

  // Phase 3, by one part.
  __device__ __forceinline__ void select() const {
    std::int32_t* out =
        a_.selection +
        (std::int64_t{head_kv_} * a_.batch.num_tokens + sequence_.first_token) * a_.columns;
    for (int i = static_cast<int>(threadIdx.x); i < a_.columns; i += kThreads) {
      if (i < forced_.sinks) {
        out[i] = i;
      } else if (i >= forced_.sinks + forced_.free) {
        const int block = forced_.first_local + i - forced_.sinks - forced_.free;
        out[i] = block <= own_ ? block : -1;
      }
    }
    if (forced_.free == 0) return;
    choose_blocks<kThreads>(a_.keys + row_ * a_.key_stride, a_.init_blocks, candidates_end(),
                            forced_.free, a_.to_bf16 ? kBf16KeyBits : kFloatKeyBits, shared_.select,
                            out + forced_.sinks);
  }

  const Args& a_;
  const Sequence& sequence_;
  Shared<kTiles>& shared_;
  const int warp_, lane_;
  const int head_kv_, group_;
  const std::int64_t row_;  // among all (sequence, KV head)
  const int own_;           // block of the token
  const Forced forced_;
  const int length_;
  const PooledPlane<T, kDim> fine_;
  GroupQueries<T, kDim, kTiles> queries_;
};

// Grid: parts, KV heads, sequences.
template <typename T, int kDim, int kTiles>
__global__ void __launch_bounds__(threads_of(kTiles), 1)
    score_select_kernel(const __grid_constant__ Args a) {
  __shared__ Shared<kTiles> shared;
  // In this order, so that the kernel behind finds all that was written before this one when it
  // starts; attend begins with the forced blocks then.
  wait_for_previous();
  start_next();
  const Sequence sequence(a.batch, static_cast<int>(blockIdx.z));
  if (!sequence.sparse || sequence.tokens == 0) return;
  const int length = min(sequence.length, a.batch.max_kv_length);
  Part<T, kDim, kTiles>(a, sequence, length, shared).run();
}

struct Sizes {
  Sizes(const Device& device, const ScoreSelectParams& p, bool clusters)
      : rows(std::int64_t{p.score.batch.num_sequences} * p.score.pages.layout.kv_heads),
        heads(group_tiles(p) * 8),
        key_stride(static_cast<int>(ceil_div(p.select.blocks(), 4) * 4)) {
    // At most one block for each multiprocessor, and a tile at least for each warp.
    const std::int64_t room = device.sm_count / std::max<std::int64_t>(rows, 1);
    const std::int64_t useful = ceil_div(key_stride / 4, threads_of(heads / 8) / 32);
    parts = static_cast<int>(std::clamp<std::int64_t>(std::min(room, useful), 1, kMaxParts));
    if (clusters && parts > kPortableCluster) {
      // Few clusters of 16 find room at a time.
      parts = parts >= kLargestCluster && rows <= 4 ? kLargestCluster : kPortableCluster;
    }
  }

  static int group_tiles(const ScoreSelectParams& p) {
    return p.score.heads_q / p.score.pages.layout.kv_heads <= 16 ? 2 : 4;
  }

  std::int64_t normalisers() const { return rows * kMaxParts * heads; }
  std::int64_t keys() const { return rows * key_stride; }

  std::int64_t rows;
  int heads;  // of the tiles
  int key_stride;
  int parts;
};

template <typename T, int kDim, int kTiles>
Status launch_phases(const Device& device, const Sizes& sizes, Args args, bool clusters) {
  const auto kernel = score_select_kernel<T, kDim, kTiles>;
  const auto grid = [&](int parts) {
    return dim3(static_cast<unsigned>(parts), static_cast<unsigned>(args.pool.map.heads),
                static_cast<unsigned>(args.batch.num_sequences));
  };
  if (clusters || sizes.parts == 1) {
    args.phases = kAllPhases;
    if (sizes.parts > kPortableCluster) {
      INFLLM_TRY(to_status(
          "score_select",
          cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)));
    }
    return launch_parts(device, "score_select", kernel, grid(sizes.parts), threads_of(kTiles), 0,
                        static_cast<unsigned>(sizes.parts), args);
  }
  for (const Phase phase : {kNormalise, kScore, kSelect}) {
    args.phases = phase;
    INFLLM_TRY(launch_parts(device, "score_select", kernel,
                            grid(phase == kSelect ? 1 : sizes.parts), threads_of(kTiles), 0, 1,
                            args));
  }
  return {};
}

Status run(const Backend& backend, const ScoreSelectParams& p, std::span<std::byte> workspace,
           bool clusters) {
  const Device& device = device_of(backend);
  const Sizes sizes(device, p, clusters);
  Arena arena(workspace);
  const SparseConfig& config = p.score.config;
  const Args args{.pool = PagePool(p.score.pages),
                  .batch = p.score.batch,
                  .q = p.score.q,
                  .selection = p.select.selection,
                  .normalisers = arena.take<float2>(sizes.normalisers()),
                  .keys = arena.take<BlockKeys>(sizes.keys()),
                  .key_stride = sizes.key_stride,
                  .heads_q = p.score.heads_q,
                  .scale = p.score.scale * kLog2E,
                  .init_blocks = config.init_blocks,
                  .local_blocks = config.local_blocks(),
                  .columns = p.select.columns(),
                  .fine_normaliser = config.lse_source == LseSource::kFine,
                  .to_bf16 = config.score_rounding == ScoreRounding::kBF16};
  return with_type(p.score.pages.layout.dtype, [&](auto type) {
    using T = decltype(type);
    const bool wide = p.score.pages.layout.head_dim == 128;
    if (Sizes::group_tiles(p) == 2) {
      return wide ? launch_phases<T, 128, 2>(device, sizes, args, clusters)
                  : launch_phases<T, 64, 2>(device, sizes, args, clusters);
    }
    return wide ? launch_phases<T, 128, 4>(device, sizes, args, clusters)
                : launch_phases<T, 64, 4>(device, sizes, args, clusters);
  });
}

}  // namespace

bool scores(const Backend&, const ScoreSelectParams& p) {
  const KvLayout& layout = p.score.pages.layout;
  return p.score.batch.max_query_length == 1 && p.score.heads_q / layout.kv_heads <= kMaxGroup &&
         (layout.head_dim == 64 || layout.head_dim == 128) &&
         p.select.blocks() - p.score.config.local_blocks() <= kMaxCandidates;
}

std::size_t score_select_bytes(const Backend& backend, const ScoreSelectParams& p) {
  const Sizes sizes(device_of(backend), p, false);
  ArenaSize size;
  size.take<float2>(sizes.normalisers());
  size.take<BlockKeys>(sizes.keys());
  return size.bytes();
}

Status score_select_in_phases(const Backend& backend, const ScoreSelectParams& params,
                              std::span<std::byte> workspace) {
  return run(backend, params, workspace, false);
}

Status score_select_in_clusters(const Backend& backend, const ScoreSelectParams& params,
                                std::span<std::byte> workspace) {
  return run(backend, params, workspace, true);
}

}  // namespace infllm::cuda::decode
