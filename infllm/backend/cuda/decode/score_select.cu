// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "infllm/backend/cuda/decode/normaliser.cuh"
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
constexpr int kMaxGroup = 32;
constexpr int kPrefetchedPages = 128;  // of a part, before its turn

enum Phase : int { kNormalise = 1, kScore = 2, kSelect = 4, kAllPhases = 7 };

struct Args {
  PagePool pool;
  Batch batch;
  const void* q;
  std::int32_t* selection;
  int heads_q;
  float scale;  // to logits in powers of 2
  int init_blocks;
  int local_blocks;
  int columns;
  bool fine_normaliser;
  bool to_bf16;
  int phases;
  // What parts tell each other; in clusters it stays in their shared memory.
  float2* normalisers;  // [rows][parts][heads of the tiles]
  BlockKeys* keys;      // [rows][key_stride]
  int key_stride;
};

template <int kTiles>
struct Shared {
  static constexpr int kHeads = 8 * kTiles;
  float2 of_warps[threads_of(kTiles) / 32][kHeads];  // normalisers: top and sum
  float2 of_parts[kLargestCluster][kHeads];
  float lse[kHeads];
  TopBlocksShared<threads_of(kTiles)> select;
};

// One part of one row.
template <typename T, int kDim, int kTiles>
class Part {
 public:
  static constexpr int kHeads = 8 * kTiles;
  static constexpr int kThreads = threads_of(kTiles);
  static constexpr int kWarps = kThreads / 32;
  using Plane = PooledPlane<T, kDim, kTiles>;
  using Tile = typename Plane::Tile;

  __device__ __forceinline__ Part(const Args& args, const Sequence& sequence, int length,
                                  Shared<kTiles>& shared, BlockKeys* shared_keys)
      : a_(args),
        sequence_(sequence),
        shared_(shared),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        part_(static_cast<int>(blockIdx.x)),
        parts_(static_cast<int>(gridDim.x)),
        head_kv_(static_cast<int>(blockIdx.y)),
        group_(args.heads_q / args.pool.map.heads),
        row_(static_cast<std::int64_t>(blockIdx.z) * args.pool.map.heads + head_kv_),
        length_(length),
        own_((length - 1) / kPageTokens),
        forced_(own_, args.init_blocks, args.local_blocks, args.columns),
        clustered_(args.phases == kAllPhases),
        keys_(clustered_ ? in_part(shared_keys, 0) : args.keys + row_ * args.key_stride) {
    const int tiles = forced_.free == 0 ? 0 : (candidates_end() + 3) / 4;
    first_ = share(tiles, part_, parts_) + warp_;
    end_ = share(tiles, part_ + 1, parts_);
  }

  // What needs only the batch's arrays: where the first keys are.
  __device__ __forceinline__ void prepare() {
    shared_.select.clear();
    if (clustered_)
      wait_for_parts();  // before its shared memory is written to, a part must be there
    if (a_.phases == kSelect) return;
    pages_[0] = fine().look_up(a_.pool, sequence_, first_, end_);
    pages_[1] = fine().look_up(a_.pool, sequence_, first_ + kWarps, end_);
    const Plane plane = normaliser_plane();
    const int tiles = forced_.free == 0 ? 0 : (plane.end + kTileKeys - 1) / kTileKeys;
    norm_tile_ = share(tiles, part_, parts_) + warp_;
    norm_end_ = share(tiles, part_ + 1, parts_);
    norm_pages_ = plane.look_up(a_.pool, sequence_, norm_tile_, norm_end_);
    prefetch_tiles(first_ - warp_, end_, fine());
    prefetch_tiles(norm_tile_ - warp_, norm_end_, plane);
  }

  __device__ __forceinline__ void run() {
    const bool to_score = (a_.phases & kScore) != 0;
    if ((a_.phases & kSelect) != 0 && part_ == 0) write_forced();
    if (forced_.free == 0) return;
    const T* q = static_cast<const T*>(a_.q) +
                 (std::int64_t{sequence_.first_token} * a_.heads_q + head_kv_ * group_) * kDim;
    if (a_.phases != kSelect) queries_.load(q, group_);
    Tile one, two;  // on their way while the normaliser is computed and exchanged
    if (to_score) fine().load(a_.pool, pages_[0], one);
    if ((a_.phases & kNormalise) != 0) normalise();
    if (to_score) fine().load(a_.pool, pages_[1], two);
    if (clustered_) wait_for_parts();
    if (to_score) score(one, two);
    if (clustered_) wait_for_parts();
    if ((a_.phases & kSelect) != 0 && part_ == 0) {
      __syncthreads();
      choose_blocks<kThreads>(keys_, a_.init_blocks, candidates_end(), forced_.free,
                              a_.to_bf16 ? kBf16KeyBits : kFloatKeyBits, shared_.select,
                              list() + forced_.sinks);
    }
  }

 private:
  __device__ __forceinline__ Plane fine() const { return {fine_rows(a_.pool, head_kv_, length_)}; }
  __device__ __forceinline__ Plane normaliser_plane() const {
    if (a_.fine_normaliser) return fine();
    return {coarse_rows(a_.pool, head_kv_, length_)};
  }
  // Blocks from here on are forced, or come after the token's own.
  __device__ __forceinline__ int candidates_end() const {
    return max(0, own_ + 1 - a_.local_blocks);
  }
  __device__ __forceinline__ std::int32_t* list() const {
    return a_.selection +
           (std::int64_t{head_kv_} * a_.batch.num_tokens + sequence_.first_token) * a_.columns;
  }

  // The pages of tiles first .. end - 1, unless there are so many that they would crowd out what
  // others need.
  __device__ __forceinline__ void prefetch_tiles(int first, int end, const Plane& plane) const {
    const int page = first * kTileKeys >> plane.page_shift;
    const int count = min((end * kTileKeys >> plane.page_shift) - page, kPrefetchedPages);
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      const int found = sequence_.page(page + i, a_.pool.num_pages);
      if (found >= 0) {
        prefetch(a_.pool.plane<const std::byte>(found, plane.offset),
                 a_.pool.map.row_bytes << plane.page_shift);
      }
    }
  }

  // Phase 1: this part's normalisers of all heads, for all parts.
  __device__ __forceinline__ void normalise() {
    const Plane plane = normaliser_plane();
    Normaliser heads[kTiles][2];
    Tile keys;
    plane.load(a_.pool, norm_pages_, keys);
    for (int tile = norm_tile_; tile < norm_end_; tile += kWarps) {
      const int2 pages = norm_pages_;
      norm_pages_ = plane.look_up(a_.pool, sequence_, tile + kWarps, norm_end_);
      float x[kTiles][4];
      keys.times(queries_, x);
      plane.load(a_.pool, norm_pages_, keys);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          heads[t][j].add(pages.x >= 0 ? x[t][j] * a_.scale : -kInfinity,
                          pages.y >= 0 ? x[t][2 + j] * a_.scale : -kInfinity);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        heads[t][j].template merge_lanes<4, 32>();
        if (lane_ < 4) {
          shared_.of_warps[warp_][8 * t + 2 * lane_ + j] = {heads[t][j].top, heads[t][j].sum};
        }
      }
    }
    __syncthreads();
    for (int head = warp_; head < kHeads; head += kWarps) {
      Normaliser all;
      if (lane_ < kWarps) {
        all.top = shared_.of_warps[lane_][head].x;
        all.sum = shared_.of_warps[lane_][head].y;
      }
      all.template merge_lanes<1, 32>();
      if (!clustered_) {
        if (lane_ == 0) {
          a_.normalisers[(row_ * parts_ + part_) * kHeads + head] = {all.top, all.sum};
        }
      } else if (lane_ < parts_) {
        *in_part(&shared_.of_parts[part_][head], lane_) = make_float2(all.top, all.sum);
      }
    }
  }

  // The logarithm of every head's sum over all parts; heads that do not exist, or that have nothing
  // to be normalised by, get +inf and so no weight.
  __device__ __forceinline__ void gather_normalisers() {
    for (int head = warp_; head < kHeads; head += kWarps) {
      Normaliser all;
      if (lane_ < parts_) {
        const float2 one = clustered_
                               ? shared_.of_parts[lane_][head]
                               : __ldcg(a_.normalisers + (row_ * parts_ + lane_) * kHeads + head);
        all.top = one.x;
        all.sum = one.y;
      }
      all.template merge_lanes<1, 32>();
      if (lane_ == 0) {
        shared_.lse[head] = head < group_ && all.sum > 0 ? all.top + __log2f(all.sum) : kInfinity;
      }
    }
    __syncthreads();
  }

  // Phase 2: the keys of all candidate blocks of this part. Two tiles are always in flight.
  __device__ __forceinline__ void score(Tile& one, Tile& two) {
    gather_normalisers();
    float lse[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 2; ++j) lse[t][j] = shared_.lse[8 * t + 2 * (lane_ % 4) + j];
    }
    for (int tile = first_; tile < end_; tile += 2 * kWarps) {
      score_tile(one, pages_[0], tile, lse);
      if (tile + kWarps < end_) score_tile(two, pages_[1], tile + kWarps, lse);
    }
  }

  // Uses up `keys`, of `tile` and `pages`, and sends for the tile after the next in their place.
  __device__ __forceinline__ void score_tile(Tile& keys, int2& pages, int tile,
                                             const float (&lse)[kTiles][2]) {
    const int2 next = fine().look_up(a_.pool, sequence_, tile + 2 * kWarps, end_);
    float x[kTiles][4];
    keys.times(queries_, x);
    fine().load(a_.pool, next, keys);
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
      last[r] = (r == 0 ? pages.x : pages.y) >= 0 ? sort_key(sum, a_.to_bf16) : 0;
      best[r] = max(last[r], __shfl_xor_sync(kAllLanes, last[r], 4));
      best[r] = max(best[r], __shfl_xor_sync(kAllLanes, best[r], 8));
    }
    if (lane_ % 16 == 12) {  // has the last window of two blocks
      BlockKeys* to = keys_ + 4 * tile + lane_ / 16;
      to[0] = {best[0], last[0]};
      to[2] = {best[1], last[1]};
    }
    pages = next;
  }

  __device__ __forceinline__ void write_forced() const {
    std::int32_t* out = list();
    for (int i = static_cast<int>(threadIdx.x); i < a_.columns; i += kThreads) {
      if (i < forced_.sinks) {
        out[i] = i;
      } else if (i >= forced_.sinks + forced_.free) {
        const int block = forced_.first_local + i - forced_.sinks - forced_.free;
        out[i] = block <= own_ ? block : -1;
      }
    }
  }

  const Args& a_;
  const Sequence& sequence_;
  Shared<kTiles>& shared_;
  const int warp_, lane_;
  const int part_, parts_;
  const int head_kv_, group_;
  const std::int64_t row_;  // among all (sequence, KV head)
  const int length_;
  const int own_;  // block of the token
  const Forced forced_;
  const bool clustered_;
  BlockKeys* const keys_;
  int first_, end_;  // this warp's first tile of fine windows, and where the part's end
  int norm_tile_ = 0, norm_end_ = 0;
  int2 pages_[2], norm_pages_;  // of the tiles that come next
  GroupQueries<T, kDim, kTiles> queries_;
};

// Grid: parts, KV heads, sequences.
template <typename T, int kDim, int kTiles>
__global__ void __launch_bounds__(threads_of(kTiles), 1)
    score_select_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) std::byte memory[];
  __shared__ Shared<kTiles> shared;
  const Sequence sequence(a.batch, static_cast<int>(blockIdx.z));
  const int length = min(sequence.length, a.batch.max_kv_length);
  Part<T, kDim, kTiles> part(a, sequence, length, shared, reinterpret_cast<BlockKeys*>(memory));
  const bool scored = sequence.sparse && sequence.tokens != 0;
  if (scored) part.prepare();  // beside the end of the kernel before
  // In this order, so that the kernel behind finds all that was written before this one when it
  // starts; attend begins with the forced blocks then.
  wait_for_previous();
  start_next();
  if (scored) part.run();
}

struct Sizes {
  Sizes(const Device& device, const ScoreSelectParams& p)
      : rows(std::int64_t{p.score.batch.num_sequences} * p.score.pages.layout.kv_heads),
        heads(8 * group_tiles(p)),
        key_stride(static_cast<int>(ceil_div(p.select.blocks(), 4) * 4)) {
    // At most one block for each multiprocessor, and a tile at least for each warp.
    const std::int64_t room = device.sm_count / std::max<std::int64_t>(rows, 1);
    const std::int64_t useful = ceil_div(key_stride / 4, threads_of(heads / 8) / 32);
    parts =
        static_cast<unsigned>(std::clamp<std::int64_t>(std::min(room, useful), 1, kLargestCluster));
  }

  static int group_tiles(const ScoreSelectParams& p) {
    return p.score.heads_q / p.score.pages.layout.kv_heads <= 16 ? 2 : 4;
  }
  std::int64_t normalisers() const { return rows * parts * heads; }
  std::int64_t keys() const { return rows * key_stride; }

  std::int64_t rows;
  int heads;  // of the tiles
  int key_stride;
  unsigned parts;
};

template <typename T, int kDim, int kTiles>
Status launch_phases(const Device& device, const Sizes& sizes, Args args, bool clusters) {
  const auto kernel = score_select_kernel<T, kDim, kTiles>;
  constexpr unsigned kThreads = threads_of(kTiles);
  const auto grid = [&](unsigned parts) {
    return dim3(parts, static_cast<unsigned>(args.pool.map.heads),
                static_cast<unsigned>(args.batch.num_sequences));
  };
  if (clusters || sizes.parts == 1) {
    args.phases = kAllPhases;
    const int bytes = sizes.key_stride * static_cast<int>(sizeof(BlockKeys));
    INFLLM_TRY(to_status(
        "score_select",
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)));
    const unsigned parts = INFLLM_TRY(fitting_cluster("score_select", kernel, kThreads, bytes,
                                                      sizes.parts, sizes.rows))
                               .size;
    return launch_parts(device, "score_select", kernel, grid(parts), kThreads, bytes, parts, args);
  }
  for (const Phase phase : {kNormalise, kScore, kSelect}) {
    args.phases = phase;
    INFLLM_TRY(launch_parts(device, "score_select", kernel,
                            grid(phase == kSelect ? 1 : sizes.parts), kThreads, 0, 1, args));
  }
  return {};
}

Status run(const Backend& backend, const ScoreSelectParams& p, std::span<std::byte> workspace,
           bool clusters) {
  const Device& device = device_of(backend);
  const Sizes sizes(device, p);
  Arena arena(workspace);
  const SparseConfig& config = p.score.config;
  const Args args{.pool = PagePool(p.score.pages),
                  .batch = p.score.batch,
                  .q = p.score.q,
                  .selection = p.select.selection,
                  .heads_q = p.score.heads_q,
                  .scale = p.score.scale * kLog2E,
                  .init_blocks = config.init_blocks,
                  .local_blocks = config.local_blocks(),
                  .columns = p.select.columns(),
                  .fine_normaliser = config.lse_source == LseSource::kFine,
                  .to_bf16 = config.score_rounding == ScoreRounding::kBF16,
                  .normalisers = arena.take<float2>(sizes.normalisers()),
                  .keys = arena.take<BlockKeys>(sizes.keys()),
                  .key_stride = sizes.key_stride};
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

bool scores(const KvLayout& layout, std::int32_t heads_q, const Batch& batch,
            const SparseConfig& config) {
  return batch.max_query_length == 1 && heads_q / layout.kv_heads <= kMaxGroup &&
         (layout.head_dim == 64 || layout.head_dim == 128) &&
         config.blocks_in(batch.max_kv_length) - config.local_blocks() <= kMaxCandidates;
}

bool scores(const Backend&, const ScoreSelectParams& p) {
  return scores(p.score.pages.layout, p.score.heads_q, p.score.batch, p.score.config);
}

std::size_t score_select_bytes(const Backend& backend, const ScoreSelectParams& p) {
  const Sizes sizes(device_of(backend), p);
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
