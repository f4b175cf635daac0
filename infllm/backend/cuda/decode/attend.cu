// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "infllm/backend/cuda/decode/attend.h"
#include "infllm/backend/cuda/decode/attend_warp.cuh"
#include "infllm/backend/cuda/decode/merge.cuh"
#include "infllm/backend/cuda/decode/row.cuh"
#include "infllm/backend/cuda/decode/score_select.h"
#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/core/arena.h"

namespace infllm::cuda::decode {
namespace {

// Four warps share a block of keys, 16 tokens each. Two teams of them alternate where rows are few
// and every multiprocessor has one thread block; one team where there are more.
constexpr int kTeamWarps = 4;
constexpr int kFewTeams = 2;
constexpr int kTeamRingBytes = 96 * 1024;
constexpr int kMaxSplits = 64;
constexpr int kManyPages = 16;  // of a thread block: rather split a row into several clusters
constexpr int kSplitCluster = 4;

struct Args {
  PagePool pool;
  Batch batch;
  const void* q;
  void* o;
  float* lse;
  const std::int32_t* selection;
  int columns;
  int heads_q;
  int head_tiles;  // of 16 heads in a group
  float scale;     // to logits in powers of 2
  // The forced blocks are known before the selection is.
  bool early;
  int init_blocks;
  int local_blocks;
  // Results of several splits of a row, normalised, and their LSE in powers of 2.
  int splits;
  float* split_o;    // [T][Hq][splits][D]
  float* split_lse;  // [T][Hq][splits]
};

template <typename T, int kDim, int kTeams>
struct Shared {
  static constexpr int kWarps = kTeams * kTeamWarps;
  static constexpr int kStages =
      kTeamRingBytes / (kTeamWarps * 2 * kSliceTokens * kDim * static_cast<int>(sizeof(T)));
  using Ring = KvRing<T, kDim, kStages>;

  struct Merge {
    WarpResults<kDim, kWarps> warps;
    float weight[kLargestCluster][kRowHeads];  // of the results of the cluster's blocks
    float lse[kRowHeads];
    // Read by the other blocks of the cluster.
    alignas(16) float o[kRowHeads][kDim];
    float2 total[kRowHeads];  // maximum and sum
  };

  union {
    Ring rings[kWarps];
    Merge merge;  // when the rings are done with
  };
};

// One thread block's share of a row.
template <typename T, int kDim, int kTeams>
class Split {
 public:
  using S = Shared<T, kDim, kTeams>;
  using Ring = typename S::Ring;
  static constexpr int kWarps = S::kWarps;
  static constexpr int kThreads = 32 * kWarps;

  __device__ __forceinline__ Split(const Args& args, const Sequence& sequence, S& shared)
      : a_(args),
        sequence_(sequence),
        shared_(shared),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        head_kv_(static_cast<int>(blockIdx.y) / args.head_tiles),
        own_((sequence.length - 1) / kPageTokens) {
    const int group = args.heads_q / args.pool.map.heads;
    const int first = static_cast<int>(blockIdx.y) % args.head_tiles * kRowHeads;
    first_head_ = head_kv_ * group + first;
    heads_ = min(kRowHeads, group - first);
    values_ = static_cast<int>((args.pool.map.value(0) - args.pool.map.key(0)) / sizeof(T));
  }

  __device__ __forceinline__ void run() {
    const std::int64_t token = sequence_.first_token;
    {
      T* q = shared_.rings[warp_].stages[0].keys;
      Ring::fetch_rows(q, static_cast<const T*>(a_.q) + (token * a_.heads_q + first_head_) * kDim,
                       heads_);
      tile::cp_async_commit();
      tile::cp_async_wait<0>();
      __syncwarp();
      attention_.template start<Ring>(q, a_.scale);
      __syncwarp();  // before the stage is used again
    }
    const std::int32_t* chosen =
        a_.selection + (std::int64_t{head_kv_} * a_.batch.num_tokens + token) * a_.columns;
    const bool dense = a_.selection == nullptr || !sequence_.sparse;
    const Forced forced(own_, a_.init_blocks, a_.local_blocks, a_.columns);
    Blocks blocks{.total = dense ? own_ + 1 : min(a_.columns, own_ + 1), .list = chosen};
    if (dense) blocks.list = nullptr;
    if (a_.early && !dense) {
      blocks = {.total = forced.count(), .sinks = forced.sinks, .shift = forced.first_local};
    }
    // Once, or twice: before and after the selection is there. One instance of the loop, as a cold
    // instruction costs more than it does.
#pragma unroll 1
    for (int turn = 0;; ++turn) {
      attend_to_share(blocks, turn);
      if (!a_.early || turn == 1) break;
      wait_for_previous();
      if (dense) break;
      blocks = {.total = forced.free, .list = chosen + forced.sinks};
    }
    merge_warps();
    wait_for_parts();
    merge_cluster();
    wait_for_parts();  // nobody leaves while others read its results
  }

 private:
  // What to attend to.
  struct Blocks {
    __device__ __forceinline__ int operator[](int i) const {
      if (list != nullptr) return __ldcg(list + i);
      return i < sinks ? i : i - sinks + shift;
    }
    int total = 0;
    const std::int32_t* list = nullptr;
    int sinks = 0;  // without a list: 0 .. sinks - 1, then from `shift` on
    int shift = 0;
  };

  // Those that fall to this warp's team, dealt out from the other end in the second turn, so that
  // nobody gets the larger share twice.
  __device__ __forceinline__ void attend_to_share(const Blocks& blocks, int turn) {
    const int teams = static_cast<int>(gridDim.x) * kTeams;
    const int place = static_cast<int>(blockIdx.x) * kTeams + warp_ / kTeamWarps;
    const int team = turn == 0 ? place : teams - 1 - place;
    const int slice = warp_ % kTeamWarps * kSliceTokens;
    const int first = share(blocks.total, team, teams);
    const int end = share(blocks.total, team + 1, teams);
    Ring& ring = shared_.rings[warp_];

    // Pages of 32 blocks at a time, one a lane, and the next 32 on their way.
    int page = -1, next_page;     // -1: none
    int tokens = 0, next_tokens;  // from the block's first one on
    const auto look_up = [&](int i) {
      const int block = i < end ? blocks[i] : -1;
      next_page = block > own_ ? -1 : sequence_.page(block, a_.pool.num_pages);
      next_tokens = sequence_.length - block * kPageTokens;
    };
    look_up(first + lane_);
    int stage = 0;       // that comes next
    int free_stage = 0;  // that is filled next
#pragma unroll 1
    for (int i = first - (S::kStages - 1); i < end; ++i) {
      if (i >= first) {
        tile::cp_async_wait<S::kStages - 2>();
        __syncwarp();  // the stage has arrived for all lanes, and the one before is used up
      }
      const int ahead = i + S::kStages - 1;
      if (ahead < end) {
        const int lane = (ahead - first) % 32;
        if (lane == 0) {
          page = next_page;
          tokens = next_tokens;
          look_up(ahead + 32 + lane_);
        }
        const int from = max(0, __shfl_sync(kAllLanes, page, lane));
        const int count = __shfl_sync(kAllLanes, page < 0 ? 0 : tokens, lane) - slice;
        const T* plane = a_.pool.plane<const T>(from, a_.pool.map.key(head_kv_)) + slice * kDim;
        ring.fetch(free_stage, plane, plane + values_, max(0, min(count, kSliceTokens)));
        if (++free_stage == S::kStages) free_stage = 0;
      }
      tile::cp_async_commit();
      if (i < first) continue;
      const int count = ring.counts[stage];
      if (count > 0) {
        attention_.template add<Ring>(ring.stages[stage].keys, ring.stages[stage].values, count);
      }
      if (++stage == S::kStages) stage = 0;
    }
    __syncwarp();
  }

  // The warps' results become this thread block's: merge.o and merge.total.
  __device__ __forceinline__ void merge_warps() {
    typename S::Merge& m = shared_.merge;
    tile::cp_async_wait<0>();
    __syncthreads();
    m.warps.put(attention_, warp_);
    __syncthreads();
    m.warps.merge([&](int head, int d, float4 o) { *reinterpret_cast<float4*>(&m.o[head][d]) = o; },
                  [&](int head, float top, float sum) {
                    m.total[head] = {top, sum};
                  });
  }

  // Each block of the cluster puts its share of the outputs together.
  __device__ __forceinline__ void merge_cluster() {
    typename S::Merge& m = shared_.merge;
    const int parts = part_count();
    constexpr int kLanes = static_cast<int>(kLargestCluster);
    for (int i = static_cast<int>(threadIdx.x); i < kRowHeads * kLanes; i += kThreads) {
      const int head = i / kLanes;
      const int part = i % kLanes;
      float2 total = {-kInfinity, 0};
      if (part < parts) total = *in_part(&m.total[head], part);
      float top = total.x;
      float sum = total.y;
      const float weight = merge_weight<kLanes>(top, sum);
      m.weight[part][head] = sum > 0 ? weight / sum : 0;
      if (part == 0) m.lse[head] = sum > 0 ? top + __log2f(sum) : -kInfinity;
    }
    __syncthreads();
    for (int i = part_rank() * kThreads + static_cast<int>(threadIdx.x); i < heads_ * kDim;
         i += parts * kThreads) {
      const int head = i / kDim;
      float o = 0;
      float* from = &m.o[head][i % kDim];
#pragma unroll 8
      for (int p = 0; p < parts; ++p) o += m.weight[p][head] * *in_part(from, p);
      store(first_head_ + head, i % kDim, o, m.lse[head]);
    }
  }

  __device__ void store(int head, int d, float o, float lse) const {
    const std::int64_t row = std::int64_t{sequence_.first_token} * a_.heads_q + head;
    if (a_.splits > 1) {
      const std::int64_t split = row * a_.splits + static_cast<int>(blockIdx.x) / part_count();
      a_.split_o[split * kDim + d] = o;
      if (d == 0) a_.split_lse[split] = lse;
      return;
    }
    static_cast<T*>(a_.o)[row * kDim + d] = to<T>(o);
    if (d == 0 && a_.lse != nullptr) {
      a_.lse[std::int64_t{head} * a_.batch.num_tokens + sequence_.first_token] = lse * kLn2;
    }
  }

  const Args& a_;
  const Sequence& sequence_;
  S& shared_;
  const int warp_, lane_;
  const int head_kv_;
  const int own_;  // block of the token
  int first_head_;
  int heads_;   // of the 16 rows that exist
  int values_;  // elements from a head's keys to its values
  WarpAttention<T, kDim> attention_;
};

// Grid: parts of a row, (KV head, 16 heads of its group), sequences.
template <typename T, int kDim, int kTeams>
__global__ void __launch_bounds__(32 * kTeamWarps * kTeams, 2 / kTeams)
    attend_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) std::byte memory[];
  start_next();
  if (!a.early) wait_for_previous();
  Sequence sequence(a.batch, static_cast<int>(blockIdx.z));
  if (sequence.tokens == 0) {
    wait_for_previous();
    return;
  }
  sequence.length = min(sequence.length, a.batch.max_kv_length);
  Split<T, kDim, kTeams>(a, sequence, *reinterpret_cast<Shared<T, kDim, kTeams>*>(memory)).run();
}

// Grid: heads, tokens. A thread has one element.
template <typename T, int kDim>
__global__ void __launch_bounds__(kDim) merge_kernel(const __grid_constant__ Args a) {
  start_next();
  wait_for_previous();
  const std::int64_t token = blockIdx.y;
  const int head = static_cast<int>(blockIdx.x);
  const int d = static_cast<int>(threadIdx.x);
  const std::int64_t row = token * a.heads_q + head;
  const float* lse = a.split_lse + row * a.splits;
  const float* results = a.split_o + row * a.splits * kDim + d;
  float top = -kInfinity;
#pragma unroll 8
  for (int s = 0; s < a.splits; ++s) top = fmaxf(top, __ldcg(lse + s));
  const float base = top == -kInfinity ? 0 : top;
  float sum = 0;
  float o = 0;
#pragma unroll 8
  for (int s = 0; s < a.splits; ++s) {
    const float weight = tile::fast_exp2(__ldcg(lse + s) - base);
    sum += weight;
    o += weight * __ldcg(results + s * kDim);
  }
  static_cast<T*>(a.o)[row * kDim + d] = to<T>(sum > 0 ? o / sum : 0);
  if (d == 0 && a.lse != nullptr) {
    a.lse[std::int64_t{head} * a.batch.num_tokens + token] =
        sum > 0 ? (top + log2f(sum)) * kLn2 : -kInfinity;
  }
}

int head_tiles(const AttendParams& p) {
  return static_cast<int>(ceil_div(p.heads_q / p.pages.layout.kv_heads, kRowHeads));
}

// How the device is shared out among the rows.
struct Shape {
  Shape(const Device& device, const AttendParams& p) {
    rows = std::max<std::int64_t>(
        1, std::int64_t{p.batch.num_sequences} * p.pages.layout.kv_heads * head_tiles(p));
    blocks = std::max<std::int64_t>(
        1, p.selection != nullptr ? p.columns : ceil_div(p.batch.max_kv_length, kPageTokens));
    few = 2 * rows <= device.sm_count;
    room = std::max<std::int64_t>(1, (few ? 1 : 2) * device.sm_count / rows);
  }

  int most_splits() const {
    return static_cast<int>(std::min<std::int64_t>({room, blocks, kMaxSplits}));
  }

  std::int64_t rows;
  std::int64_t blocks;  // of a row, to be attended to
  std::int64_t room;    // thread blocks of a row that run at once
  bool few;
};

template <typename T, int kDim, int kTeams>
Status launch_rows(const Device& device, const Shape& shape, const AttendParams& p, Args args,
                   bool clusters) {
  const auto kernel = attend_kernel<T, kDim, kTeams>;
  constexpr unsigned kThreads = 32 * kTeamWarps * kTeams;
  constexpr int kBytes = sizeof(Shared<T, kDim, kTeams>);
  INFLLM_TRY(to_status(
      "attend", cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes)));
  Clusters parts{.size = 1, .count = shape.room * shape.rows};
  if (clusters) {
    const auto fit = [&](std::int64_t wanted) {
      return fitting_cluster("attend", kernel, kThreads, kBytes,
                             static_cast<unsigned>(std::min({shape.room, shape.blocks, wanted})),
                             shape.rows);
    };
    parts = INFLLM_TRY(fit(kLargestCluster));
    // Many pages for each block: small clusters leave fewer multiprocessors idle, and there is time
    // for another launch.
    if (shape.blocks > kManyPages * parts.size) parts = INFLLM_TRY(fit(kSplitCluster));
  }
  const std::int64_t useful = ceil_div(shape.blocks, parts.size == 1 ? 2 : 8 * parts.size);
  const bool whole = parts.size > 1 && shape.blocks <= kManyPages * parts.size;
  args.splits = whole ? 1
                      : static_cast<int>(std::clamp<std::int64_t>(
                            std::min(parts.count / shape.rows, useful), 1, shape.most_splits()));
  const unsigned cluster = parts.size;
  const dim3 grid(cluster * static_cast<unsigned>(args.splits),
                  static_cast<unsigned>(p.pages.layout.kv_heads * args.head_tiles),
                  static_cast<unsigned>(p.batch.num_sequences));
  INFLLM_TRY(launch_parts(device, "attend", kernel, grid, kThreads, kBytes, cluster, args));
  if (args.splits == 1) return {};
  const dim3 rows(static_cast<unsigned>(p.heads_q), static_cast<unsigned>(p.batch.num_tokens));
  return launch_parts(device, "attend", merge_kernel<T, kDim>, rows, kDim, 0, 1, args);
}

Status run(const Backend& backend, const AttendParams& p, std::span<std::byte> workspace,
           bool clusters) {
  const Device& device = device_of(backend);
  const Shape shape(device, p);
  const std::int64_t results = std::int64_t{p.batch.num_tokens} * p.heads_q * shape.most_splits();
  Arena arena(workspace);
  Args args{.pool = PagePool(p.pages),
            .batch = p.batch,
            .q = p.q,
            .o = p.o,
            .lse = static_cast<float*>(p.lse),
            .selection = p.selection,
            .columns = p.columns,
            .heads_q = p.heads_q,
            .head_tiles = head_tiles(p),
            .scale = p.scale * kLog2E};
  // Only the kernel of this folder starts the next one when all before it has ended.
  if (p.selection != nullptr && p.follows_select != nullptr &&
      scores(p.pages.layout, p.heads_q, p.batch, *p.follows_select)) {
    args.early = true;
    args.init_blocks = p.follows_select->init_blocks;
    args.local_blocks = p.follows_select->local_blocks();
  }
  if (shape.most_splits() > 1) {
    args.split_o = arena.take<float>(results * p.pages.layout.head_dim);
    args.split_lse = arena.take<float>(results);
  }
  return with_type(p.pages.layout.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.pages.layout.head_dim == 128) {
      return shape.few ? launch_rows<T, 128, kFewTeams>(device, shape, p, args, clusters)
                       : launch_rows<T, 128, 1>(device, shape, p, args, clusters);
    }
    return shape.few ? launch_rows<T, 64, kFewTeams>(device, shape, p, args, clusters)
                     : launch_rows<T, 64, 1>(device, shape, p, args, clusters);
  });
}

}  // namespace

bool attends(const Backend&, const AttendParams& p) {
  const std::int32_t dim = p.pages.layout.head_dim;
  return p.batch.max_query_length == 1 && (dim == 64 || dim == 128);
}

std::size_t attend_bytes(const Backend& backend, const AttendParams& p) {
  const int splits = Shape(device_of(backend), p).most_splits();
  if (splits == 1) return 0;
  const std::int64_t results = std::int64_t{p.batch.num_tokens} * p.heads_q * splits;
  ArenaSize size;
  size.take<float>(results * p.pages.layout.head_dim);
  size.take<float>(results);
  return size.bytes();
}

Status attend_in_splits(const Backend& backend, const AttendParams& params,
                        std::span<std::byte> workspace) {
  return run(backend, params, workspace, false);
}

Status attend_in_clusters(const Backend& backend, const AttendParams& params,
                          std::span<std::byte> workspace) {
  return run(backend, params, workspace, true);
}

}  // namespace infllm::cuda::decode
