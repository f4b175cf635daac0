// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "infllm/backend/cuda/decode/attend.h"
#include "infllm/backend/cuda/decode/attend_warp.cuh"
#include "infllm/backend/cuda/decode/row.cuh"
#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/core/arena.h"

namespace infllm::cuda::decode {
namespace {

constexpr int kWarps = 4;  // each has 16 tokens of every block
constexpr int kThreads = 32 * kWarps;
constexpr int kRingBytes = 96 * 1024;  // of a thread block: two on a multiprocessor of 9.0
constexpr int kLargestCluster = 16;
constexpr int kPortableCluster = 8;
constexpr int kMaxSplits = 64;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

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

template <typename T, int kDim>
struct Shared {
  static constexpr int kStages =
      kRingBytes / (kWarps * 2 * kSliceTokens * kDim * static_cast<int>(sizeof(T)));
  static constexpr int kPadded = kDim + 8;  // eight rows of a quad's pairs in different banks
  using Ring = KvRing<T, kDim, kStages>;

  struct Merge {
    float warp_o[kWarps][kRowHeads][kPadded];
    float warp_top[kWarps][kRowHeads];
    float warp_sum[kWarps][kRowHeads];
    float2 parts[kLargestCluster][kRowHeads];  // top and sum; then x: weight
    float lse[kRowHeads];
    // Read by the other blocks of the cluster.
    float o[kRowHeads][kDim];
    float top[kRowHeads];
    float sum[kRowHeads];
  };

  union {
    Ring rings[kWarps];
    Merge merge;  // when the rings are done with
  };
};

// One thread block's share of a row.
template <typename T, int kDim>
class Split {
 public:
  using S = Shared<T, kDim>;
  using Ring = typename S::Ring;

  __device__ Split(const Args& args, const Sequence& sequence, S& shared)
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
  }

  __device__ __forceinline__ void run() {
    const std::int64_t token = sequence_.first_token;
    attention_.start(static_cast<const T*>(a_.q) + (token * a_.heads_q + first_head_) * kDim,
                     heads_, a_.scale);
    if (a_.selection == nullptr || !sequence_.sparse) {
      attend_to_share(own_ + 1, [](int i) { return i; });
      if (a_.early) wait_for_previous();
    } else {
      const std::int32_t* chosen =
          a_.selection + (std::int64_t{head_kv_} * a_.batch.num_tokens + token) * a_.columns;
      const auto listed = [&](int i) { return __ldcg(chosen + i); };
      if (a_.early) {
        const Forced forced(own_, a_.init_blocks, a_.local_blocks, a_.columns);
        attend_to_share(forced.count(), [&](int i) { return forced.block(i); });
        wait_for_previous();
        // In reverse, so that nobody gets the larger share twice.
        attend_to_share(forced.free,
                        [&](int i) { return listed(forced.sinks + forced.free - 1 - i); });
      } else {
        attend_to_share(min(a_.columns, own_ + 1), listed);
      }
    }
    merge_warps();
    wait_for_parts();
    merge_cluster();
    wait_for_parts();  // nobody leaves while others read its results
  }

 private:
  // Of `total` blocks, named by block_of(0 .. total - 1), those that fall to this thread block.
  template <typename BlockOf>
  __device__ __forceinline__ void attend_to_share(int total, BlockOf&& block_of) {
    const int part = static_cast<int>(blockIdx.x);
    const int parts = static_cast<int>(gridDim.x);
    const int first = share(total, part, parts);
    const int end = share(total, part + 1, parts);
    Ring& ring = shared_.rings[warp_];

    // Pages of 32 blocks at a time, one a lane, and the next 32 on their way.
    struct Place {
      int page;    // -1: none
      int tokens;  // from the block's first one on
    };
    const auto look_up = [&](int i) -> Place {
      const int block = i < end ? block_of(i) : -1;
      if (block > own_) return {-1, 0};
      return {sequence_.page(block, a_.pool.num_pages), sequence_.length - block * kPageTokens};
    };
    Place places{-1, 0};
    Place next = look_up(first + lane_);
    int fetched = first;
    const auto fetch = [&](int stage) {
      if (fetched < end) {
        const int i = (fetched - first) % 32;
        if (i == 0) {
          places = next;
          next = look_up(fetched + 32 + lane_);
        }
        const int page = __shfl_sync(kAllLanes, places.page, i);
        const int tokens = __shfl_sync(kAllLanes, places.tokens, i) - kSliceTokens * warp_;
        const int count = page < 0 ? 0 : max(0, min(tokens, kSliceTokens));
        const int row = kSliceTokens * warp_ * kDim;
        ring.fetch(stage, a_.pool.plane<const T>(max(page, 0), a_.pool.map.key(head_kv_)) + row,
                   a_.pool.plane<const T>(max(page, 0), a_.pool.map.value(head_kv_)) + row, count);
        ++fetched;
      }
      tile::cp_async_commit();
    };

    for (int stage = 0; stage < S::kStages - 1; ++stage) fetch(stage);
    int stage = 0;
    for (int i = first; i < end; ++i) {
      tile::cp_async_wait<S::kStages - 2>();
      __syncwarp();  // the stage has arrived for all lanes, and the one before is used up
      fetch(stage == 0 ? S::kStages - 1 : stage - 1);
      const int count = ring.counts[stage];
      if (count > 0) attention_.template add<Ring>(ring.stages[stage], count);
      if (++stage == S::kStages) stage = 0;
    }
    __syncwarp();
  }

  // The warps' results become this thread block's: shared_.merge.o, top, sum.
  __device__ __forceinline__ void merge_warps() {
    typename S::Merge& m = shared_.merge;
    tile::cp_async_wait<0>();
    __syncthreads();
    attention_.finish(&m.warp_o[warp_][0][0], S::kPadded, m.warp_top[warp_], m.warp_sum[warp_]);
    __syncthreads();
    const int head = static_cast<int>(threadIdx.x) / (kThreads / kRowHeads);
    float top = -kInfinity;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, m.warp_top[w][head]);
    float weight[kWarps];
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      weight[w] = top == -kInfinity ? 0 : tile::fast_exp2(m.warp_top[w][head] - top);
      sum += weight[w] * m.warp_sum[w][head];
    }
    const int lane = static_cast<int>(threadIdx.x) % (kThreads / kRowHeads);
    for (int d = lane; d < kDim; d += kThreads / kRowHeads) {
      float o = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) o += weight[w] * m.warp_o[w][head][d];
      m.o[head][d] = o;
    }
    if (lane == 0) {
      m.top[head] = top;
      m.sum[head] = sum;
    }
    __syncthreads();
  }

  // Each block of the cluster puts every parts-th run of kThreads outputs together.
  __device__ __forceinline__ void merge_cluster() {
    typename S::Merge& m = shared_.merge;
    const int parts = part_count();
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < parts * kRowHeads; i += kThreads) {
      const int head = i % kRowHeads;
      m.parts[i / kRowHeads][head] = {load_from_part(&m.top[head], i / kRowHeads),
                                      load_from_part(&m.sum[head], i / kRowHeads)};
    }
    __syncthreads();
    if (thread < kRowHeads) {
      float top = -kInfinity;
      for (int p = 0; p < parts; ++p) top = fmaxf(top, m.parts[p][thread].x);
      float sum = 0;
      for (int p = 0; p < parts; ++p) {
        const float2 part = m.parts[p][thread];
        const float factor = part.y > 0 ? tile::fast_exp2(part.x - top) : 0;
        sum += factor * part.y;
        m.parts[p][thread].x = factor;
      }
      const float scale = sum > 0 ? 1 / sum : 0;
      for (int p = 0; p < parts; ++p) m.parts[p][thread].x *= scale;
      m.lse[thread] = sum > 0 ? top + log2f(sum) : -kInfinity;
    }
    __syncthreads();
    for (int i = part_rank() * kThreads + thread; i < heads_ * kDim; i += parts * kThreads) {
      const int head = i / kDim;
      float o = 0;
#pragma unroll 4
      for (int p = 0; p < parts; ++p) {
        o += m.parts[p][head].x * load_from_part(&m.o[head][i % kDim], p);
      }
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
  int heads_;  // of the 16 rows that exist
  WarpAttention<T, kDim> attention_;
};

// Grid: parts of a row, (KV head, 16 heads of its group), sequences.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 2) attend_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) std::byte memory[];
  start_next();
  if (!a.early) wait_for_previous();
  Sequence sequence(a.batch, static_cast<int>(blockIdx.z));
  if (sequence.tokens == 0) {
    wait_for_previous();
    return;
  }
  sequence.length = min(sequence.length, a.batch.max_kv_length);
  Split<T, kDim>(a, sequence, *reinterpret_cast<Shared<T, kDim>*>(memory)).run();
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
  float top = -kInfinity;
  for (int s = 0; s < a.splits; ++s) top = fmaxf(top, __ldcg(lse + s));
  float sum = 0, o = 0;
  for (int s = 0; s < a.splits && top > -kInfinity; ++s) {
    const float weight = tile::fast_exp2(__ldcg(lse + s) - top);
    sum += weight;
    o += weight * __ldcg(a.split_o + (row * a.splits + s) * kDim + d);
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

// How many thread blocks share a row: `splits` times `cluster`.
struct Shape {
  Shape(const Device& device, const AttendParams& p, bool clusters) {
    const std::int64_t rows = std::max<std::int64_t>(
        1, std::int64_t{p.batch.num_sequences} * p.pages.layout.kv_heads * head_tiles(p));
    const std::int64_t blocks =
        p.selection != nullptr ? p.columns : ceil_div(p.batch.max_kv_length, kPageTokens);
    const std::int64_t room = std::max<std::int64_t>(1, 2 * device.sm_count / rows);
    if (!clusters) {
      cluster = 1;
      splits = static_cast<int>(
          std::clamp<std::int64_t>(std::min(room, ceil_div(blocks, 2)), 1, kMaxSplits));
      return;
    }
    // A cluster of 16 needs a free multiprocessor cluster; only few rows can count on it.
    cluster = static_cast<int>(std::min<std::int64_t>(
        {room, std::max<std::int64_t>(1, blocks), rows <= 4 ? kLargestCluster : kPortableCluster}));
    if (cluster > kPortableCluster && cluster < kLargestCluster) cluster = kPortableCluster;
    // A second launch is worth it when a block would have many pages to read.
    splits = 1;
    if (blocks > 16 * cluster) {
      splits = static_cast<int>(std::clamp<std::int64_t>(
          std::min(room / cluster, ceil_div(blocks, 8 * cluster)), 1, kMaxSplits));
    }
  }

  int cluster;
  int splits;
};

template <typename T, int kDim>
Status launch_rows(const Device& device, const Shape& shape, const AttendParams& p,
                   const Args& args) {
  const auto kernel = attend_kernel<T, kDim>;
  constexpr int kBytes = sizeof(Shared<T, kDim>);
  INFLLM_TRY(to_status(
      "attend", cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes)));
  if (shape.cluster > kPortableCluster) {
    INFLLM_TRY(to_status(
        "attend", cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)));
  }
  const dim3 grid(static_cast<unsigned>(shape.cluster * shape.splits),
                  static_cast<unsigned>(p.pages.layout.kv_heads * args.head_tiles),
                  static_cast<unsigned>(p.batch.num_sequences));
  INFLLM_TRY(launch_parts(device, "attend", kernel, grid, kThreads, kBytes,
                          static_cast<unsigned>(shape.cluster), args));
  if (shape.splits == 1) return {};
  const dim3 rows(static_cast<unsigned>(p.heads_q), static_cast<unsigned>(p.batch.num_tokens));
  return launch_parts(device, "attend", merge_kernel<T, kDim>, rows, kDim, 0, 1, args);
}

Status run(const Backend& backend, const AttendParams& p, std::span<std::byte> workspace,
           bool clusters) {
  const Device& device = device_of(backend);
  const Shape shape(device, p, clusters);
  const std::int64_t results = std::int64_t{p.batch.num_tokens} * p.heads_q * shape.splits;
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
            .scale = p.scale * kLog2E,
            .splits = shape.splits};
  if (p.selection != nullptr && p.follows_select != nullptr) {
    args.early = true;
    args.init_blocks = p.follows_select->init_blocks;
    args.local_blocks = p.follows_select->local_blocks();
  }
  if (shape.splits > 1) {
    args.split_o = arena.take<float>(results * p.pages.layout.head_dim);
    args.split_lse = arena.take<float>(results);
  }
  return with_type(p.pages.layout.dtype, [&](auto type) {
    using T = decltype(type);
    return p.pages.layout.head_dim == 128 ? launch_rows<T, 128>(device, shape, p, args)
                                          : launch_rows<T, 64>(device, shape, p, args);
  });
}

}  // namespace

bool attends(const Backend&, const AttendParams& p) {
  const std::int32_t dim = p.pages.layout.head_dim;
  return p.batch.max_query_length == 1 && (dim == 64 || dim == 128);
}

std::size_t attend_bytes(const Backend& backend, const AttendParams& p) {
  const Device& device = device_of(backend);
  const std::int64_t splits =
      std::max(Shape(device, p, false).splits, Shape(device, p, true).splits);
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
