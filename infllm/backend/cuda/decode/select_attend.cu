// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <climits>

#include "infllm/backend/cuda/decode/attend.h"
#include "infllm/backend/cuda/decode/attend_warp.cuh"
#include "infllm/backend/cuda/decode/exchange.cuh"
#include "infllm/backend/cuda/decode/merge.cuh"
#include "infllm/backend/cuda/decode/normaliser.cuh"
#include "infllm/backend/cuda/decode/part_results.cuh"
#include "infllm/backend/cuda/decode/row_work.cuh"
#include "infllm/backend/cuda/decode/score_select.h"
#include "infllm/backend/cuda/decode/select_attend.h"
#include "infllm/backend/cuda/decode/top_blocks.cuh"
#include "infllm/backend/cuda/numbers.cuh"

namespace infllm::cuda::decode {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kMinParts = 16;  // of a row: with fewer, clusters are as fast or faster
// Leaves multiprocessors to the kernel behind, which prepares itself meanwhile.
constexpr int kMaxParts = kMaxResultParts;
constexpr int kMaxColumns = 512;
constexpr int kMaxKeys = 1 << 19;
constexpr int kPrefetchedItems = 12;  // of a warp, before its turn

struct Args {
  PagePool pool;
  Batch batch;
  const void* q_score;
  const void* q;
  void* o;
  float* lse;
  std::int32_t* selection;
  int columns;
  int heads_q;
  float score_scale;  // to logits in powers of 2
  float scale;
  int init_blocks;
  int local_blocks;
  bool fine_normaliser;
  // What parts tell each other; kNothing everywhere between two launches. Words with many readers
  // are cleared by their writer, who knows that all have read them when all have answered; words
  // with one reader by that one.
  std::uint32_t* normalisers;  // [rows][16][parts]
  std::uint32_t* results;      // of PartResults, [rows][parts]
  std::uint32_t* keys;         // [rows][key_stride], packed
  int key_stride;
};

template <typename T, int kDim>
struct Shared {
  static constexpr int kStages = kDim == 128 ? 3 : 4;
  using Ring = KvRing<T, kDim, kStages>;

  union {
    Ring rings[kWarps];
    std::uint32_t keys[kMaxCandidates];  // while the rings are empty
    WarpResults<kDim, kWarps> warps;     // when they are done with
  };
  union {
    const T* first_rows[kWarps][kStages][kItemRows];  // of each warp's first items
    typename PartResults<kDim, kThreads>::Shared parts;
  };
  alignas(16) T q[2][kRowHeads * kDim];  // to score with, to attend with
  float2 of_warps[kWarps][kRowHeads];    // normalisers
  float lse[kRowHeads];
  TopBlocksShared<kThreads> select;
  std::int32_t list[kMaxColumns];  // the blocks chosen freely
};

// One part of one row.
template <typename T, int kDim>
class Part {
 public:
  using S = Shared<T, kDim>;
  using Ring = typename S::Ring;
  static constexpr int kStages = S::kStages;
  using Results = PartResults<kDim, kThreads>;

  __device__ __forceinline__ Part(const Args& args, const Sequence& sequence, S& shared)
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
        own_((sequence.length - 1) / kPageTokens),
        forced_(own_, args.init_blocks, args.local_blocks,
                sequence.sparse ? args.columns : INT_MAX),
        fine_{args.pool.map.fine(head_kv_), kFineShift, fine_windows(sequence.length)},
        normaliser_(args.fine_normaliser ? fine_
                                         : Windows{args.pool.map.coarse(head_kv_), kCoarseShift,
                                                   coarse_windows(sequence.length)}),
        counts_{forced_.free == 0 ? 0 : (normaliser_.end + kItemRows - 1) / kItemRows,
                kBlockItems * forced_.count(), score_items(), kBlockItems * forced_.free},
        share_(counts_, part_ + parts_ * warp_, parts_ * kWarps),
        limit_(share_.ends[kScore]) {}

  // What needs only the batch's arrays: where the first rows are.
  __device__ __forceinline__ void prepare() {
    shared_.select.clear();
    for (int n = 0; n < min(limit_, kPrefetchedItems); ++n) {
      const T* row = look_up(n);
      if (n < kStages) first_row(n) = row;
      if (row != nullptr) prefetch(row, kDim * static_cast<int>(sizeof(T)));
    }
  }

  __device__ __forceinline__ void run() {
    const bool same_queries = a_.q == a_.q_score;
    const uint4 q_score = load_queries(a_.q_score);
    const uint4 q = same_queries ? q_score : load_queries(a_.q);
    fetch_ahead();
    put_queries(q_score, shared_.q[0]);
    if (!same_queries) put_queries(q, shared_.q[1]);
    __syncthreads();
    attention_.template start<Ring>(shared_.q[0], a_.scale);

    // One instance of the loop over items: code that runs once costs what it takes to fetch it.
#pragma unroll 1
    for (int turn = 0; turn < kKinds; ++turn) {
      const Kind kind = static_cast<Kind>(turn);
      if (kind == kScore) gather_normalisers();
      if (kind == kFree && forced_.free > 0) {
        choose();
        limit_ = share_.ends[kFree];
      }
      if (!same_queries) {
        attention_.template load_queries<Ring>(shared_.q[kind == kForced || kind == kFree]);
      }
      work(kind, share_.end_of(kind));
      if (kind == kNormalise) publish_normalisers();
    }
    merge();
    clear_cells();
  }

 private:
  // Blocks from here on are forced, or come after the token's own.
  __device__ __forceinline__ int candidates_end() const {
    return max(0, own_ + 1 - a_.local_blocks);
  }
  __device__ __forceinline__ int score_items() const {
    return forced_.free == 0 ? 0 : (candidates_end() + kItemBlocks - 1) / kItemBlocks;
  }
  __device__ __forceinline__ std::uint32_t* normaliser_cell(int head, int part) const {
    return a_.normalisers + (row_ * kRowHeads + head) * parts_ + part;
  }
  __device__ __forceinline__ std::uint32_t* keys() const { return a_.keys + row_ * a_.key_stride; }

  // Sixteen heads, a piece a thread; zeros for heads that do not exist.
  __device__ __forceinline__ uint4 load_queries(const void* from) const {
    const T* q = static_cast<const T*>(from) +
                 (std::int64_t{sequence_.first_token} * a_.heads_q + head_kv_ * group_) * kDim;
    const int i = static_cast<int>(threadIdx.x);
    if (i / Ring::kPieces >= group_) return make_uint4(0, 0, 0, 0);
    return __ldcg(reinterpret_cast<const uint4*>(q) + i);
  }
  __device__ __forceinline__ void put_queries(uint4 piece, T* to) const {
    const int i = static_cast<int>(threadIdx.x);
    const int head = i / Ring::kPieces;
    if (head >= kRowHeads) return;
    *reinterpret_cast<uint4*>(to + Ring::at(head, i % Ring::kPieces)) = piece;
  }

  // Where this lane's row of item n is; null: nowhere.
  __device__ __forceinline__ const T* look_up(int n) const {
    const int index = share_.index(n);
    const Kind kind = share_.kind(n);
    if (kind == kNormalise || kind == kScore) {
      const Windows windows = kind == kScore ? fine_ : normaliser_;
      const int window = index * kItemRows + lane_;
      if (window >= windows.end) return nullptr;
      const int page = sequence_.page(window >> windows.page_shift, a_.pool.num_pages);
      if (page < 0) return nullptr;
      return a_.pool.template plane<const T>(page, windows.offset) +
             (window & ((1 << windows.page_shift) - 1)) * kDim;
    }
    const int i = index / kBlockItems;
    const int block = kind == kForced ? forced_.block(i) : shared_.list[i];
    const int token = index % kBlockItems * kSliceTokens + lane_ % kSliceTokens;
    if (block * kPageTokens + token >= sequence_.length) return nullptr;
    const int page = sequence_.page(block, a_.pool.num_pages);
    if (page < 0) return nullptr;
    const std::int64_t plane =
        lane_ < kSliceTokens ? a_.pool.map.key(head_kv_) : a_.pool.map.value(head_kv_);
    return a_.pool.template plane<const T>(page, plane) + token * kDim;
  }

  // Where prepare() left the answers of the first look-ups: the keys come later.
  __device__ __forceinline__ const T*& first_row(int n) const {
    return shared_.first_rows[warp_][n][lane_];
  }

  // Fills all stages that are free.
  __device__ __forceinline__ void fetch_ahead() {
#pragma unroll 1
    for (; ahead_ < min(limit_, used_ + kStages); ++ahead_) {
      const T* row =
          ahead_ < min(kStages, share_.ends[kScore]) ? first_row(ahead_) : look_up(ahead_);
      shared_.rings[warp_].gather(ahead_ % kStages, row, static_cast<const T*>(a_.q));
      tile::cp_async_commit();
    }
  }

  // Every part has sent its results, so none looks at normalisers and keys any more.
  __device__ __forceinline__ void clear_cells() const {
    if (threadIdx.x < kRowHeads) {
      publish(normaliser_cell(static_cast<int>(threadIdx.x), part_), kNothing);
    }
#pragma unroll 1
    for (int n = share_.ends[kForced]; n < share_.ends[kScore]; ++n) {
      if (lane_ < kItemBlocks) publish(keys() + share_.index(n) * kItemBlocks + lane_, kNothing);
    }
  }

  // This warp's items up to number `end`.
  __device__ __forceinline__ void work(Kind kind, int end) {
    Ring& ring = shared_.rings[warp_];
#pragma unroll 1
    for (;; ++used_) {
      __syncwarp();  // the stage before is used up
      fetch_ahead();
      if (used_ >= end) break;
      const int behind = ahead_ - 1 - used_;
      if (behind >= kStages - 1) {
        tile::cp_async_wait<kStages - 1>();
      } else if (behind == kStages - 2) {
        tile::cp_async_wait<kStages - 2>();
      } else {
        tile::cp_async_wait<0>();
      }
      __syncwarp();  // the stage has arrived for all lanes
      const int stage = used_ % kStages;
      const std::uint32_t exist = ring.exist[stage];
      if (kind == kForced || kind == kFree) {
        const int tokens = __popc(exist & 0xffff);
        if (tokens > 0) attention_.template add<Ring>(ring.stages[stage], tokens);
        continue;
      }
      float x[2][2][4] = {};
      attention_.template rows_times_queries<Ring>(ring.stages[stage].keys, x);
      if (kind == kNormalise) {
        normalise(x, exist);
      } else {
        score(x, exist, share_.index(used_));
      }
    }
  }

  __device__ __forceinline__ bool has(std::uint32_t exist, int m, int r) const {
    return (exist >> (16 * m + 8 * r + lane_ / 4) & 1) != 0;
  }

  __device__ __forceinline__ void normalise(const float (&x)[2][2][4], std::uint32_t exist) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          normalisers_[t][j].add(has(exist, m, 0) ? x[m][t][j] * a_.score_scale : -kInfinity,
                                 has(exist, m, 1) ? x[m][t][2 + j] * a_.score_scale : -kInfinity);
        }
      }
    }
  }

  // This part's normalisers of all heads, for all parts.
  __device__ __forceinline__ void publish_normalisers() {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        normalisers_[t][j].template merge_lanes<4, 32>();
        if (lane_ < 4) {
          shared_.of_warps[warp_][8 * t + 2 * lane_ + j] = {normalisers_[t][j].top,
                                                            normalisers_[t][j].sum};
        }
      }
    }
    __syncthreads();
    if (threadIdx.x < kRowHeads) {
      const int head = static_cast<int>(threadIdx.x);
      Normaliser all;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) all.top = fmaxf(all.top, shared_.of_warps[w][head].x);
      const float base = all.top == -kInfinity ? 0 : all.top;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        all.sum +=
            shared_.of_warps[w][head].y * tile::fast_exp2(shared_.of_warps[w][head].x - base);
      }
      publish(normaliser_cell(head, part_), word_of(all.lse()));
    }
  }

  // The logarithm of every head's sum over all parts; heads that do not exist, or that have nothing
  // to be normalised by, get +inf and so no weight.
  __device__ __forceinline__ void gather_normalisers() {
    constexpr int kLanes = kThreads / kRowHeads;
    const int head = static_cast<int>(threadIdx.x) / kLanes;
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const int count = (parts_ - lane + kLanes - 1) / kLanes;
    std::uint32_t words[kMaxParts / kLanes];
    take(normaliser_cell(head, lane), kLanes, count, words);
    Normaliser all;
#pragma unroll
    for (int i = 0; i < kMaxParts / kLanes; ++i) {
      if (i < count) all.top = fmaxf(all.top, __uint_as_float(words[i]));
    }
    const float base = all.top == -kInfinity ? 0 : all.top;
#pragma unroll
    for (int i = 0; i < kMaxParts / kLanes; ++i) {
      if (i < count) all.sum += tile::fast_exp2(__uint_as_float(words[i]) - base);
    }
    all.template merge_lanes<1, kLanes>();
    if (lane == 0) shared_.lse[head] = head < group_ && all.sum > 0 ? all.lse() : kInfinity;
    __syncthreads();
  }

  // Keys of the eight blocks of an item.
  __device__ __forceinline__ void score(const float (&x)[2][2][4], std::uint32_t exist, int item) {
    float lse[2][2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int j = 0; j < 2; ++j) lse[t][j] = shared_.lse[8 * t + 2 * (lane_ % 4) + j];
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = 0;  // S of window 16 m + 8 r + lane / 4
#pragma unroll
        for (int t = 0; t < 2; ++t) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            sum += tile::fast_exp2(x[m][t][2 * r + j] * a_.score_scale - lse[t][j]);
          }
        }
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        const std::uint32_t last = has(exist, m, r) ? sort_key(sum, true) : 0;
        std::uint32_t best = max(last, __shfl_xor_sync(kAllLanes, last, 4));
        best = max(best, __shfl_xor_sync(kAllLanes, best, 8));
        if (lane_ % 16 == 12) {  // has the last window of a block
          publish(keys() + item * kItemBlocks + 4 * m + 2 * r + lane_ / 16,
                  packed({.best = best, .last = last}));
        }
      }
    }
  }

  // Every part makes the whole list, to save handing it round.
  __device__ __forceinline__ void choose() {
    const int blocks = candidates_end();
    if (blocks > 2 * kThreads && blocks <= 8 * kThreads) {
      choose_in_registers(blocks);
      return;
    }
    __syncthreads();  // the rings are empty, and so everybody sees them
    std::uint32_t* here = shared_.keys;
    constexpr int kAtOnce = 2;
    const int pieces = (blocks + 3) / 4;
    for (int i = static_cast<int>(threadIdx.x); i < pieces; i += kAtOnce * kThreads) {
      uint4 words[kAtOnce];
      const int count = min(kAtOnce, (pieces - i + kThreads - 1) / kThreads);
      take(keys() + 4 * i, 4 * kThreads, count, words);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (j < count) reinterpret_cast<uint4*>(here)[i + j * kThreads] = words[j];
      }
    }
    __syncthreads();
    choose_blocks<kThreads>(here, a_.init_blocks, blocks, forced_.free, kBf16KeyBits,
                            shared_.select, shared_.list);
    __syncthreads();
  }

  // With all keys in registers, as worth the code for about 128K tokens.
  __device__ __forceinline__ void choose_in_registers(int blocks) {
    const int first = 4 * static_cast<int>(threadIdx.x);
    const int count = first >= blocks ? 0 : first + 4 * kThreads >= blocks ? 1 : 2;
    const int count_before = lane_ == 0 ? count : 0;  // the others ask their neighbours
    // The page table into L1 meanwhile: the chosen blocks' pages are asked for next.
    for (int i = 0; i < count; ++i) {
      std::int32_t page;
      asm volatile("ld.global.ca.b32 %0, [%1];"
                   : "=r"(page)
                   : "l"(sequence_.table + first + 4 * i * kThreads));
    }
    uint4 words[2] = {};
    std::uint32_t before[2] = {};
    bool all_there;
    do {
      look_at(keys() + first, 4 * kThreads, count, words);
      if (count_before > 0) look(keys() + max(first - 1, 0), before[0]);  // 0 has no neighbour
      if (count_before > 1) look(keys() + first - 1 + 4 * kThreads, before[1]);
      all_there = are_there(count, words) && are_there(count_before, before);
    } while (!all_there);
    std::uint32_t found[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const std::uint32_t neighbour = __shfl_up_sync(kAllLanes, words[j].w, 1);
      if (lane_ > 0) before[j] = neighbour;
      if (j == 0 && first == 0) before[0] = 0;
      // The last window of a block overlaps the next one.
      found[j][0] = max(words[j].x >> 16, before[j] & 0xffff);
      found[j][1] = max(words[j].y >> 16, words[j].x & 0xffff);
      found[j][2] = max(words[j].z >> 16, words[j].y & 0xffff);
      found[j][3] = max(words[j].w >> 16, words[j].z & 0xffff);
    }
    choose_blocks<kThreads>(found, a_.init_blocks, blocks, forced_.free, kBf16KeyBits,
                            shared_.select, shared_.list);
    __syncthreads();
  }

  __device__ __forceinline__ void write_selection() const {
    std::int32_t* out =
        a_.selection +
        (std::int64_t{head_kv_} * a_.batch.num_tokens + sequence_.first_token) * a_.columns;
    for (int i = static_cast<int>(threadIdx.x); i < a_.columns; i += kThreads) {
      int block = i;
      if (i >= forced_.sinks) {
        const int local = forced_.first_local + i - forced_.sinks - forced_.free;
        block = i < forced_.sinks + forced_.free ? shared_.list[i - forced_.sinks]
                : local <= own_                  ? local
                                                 : -1;
      }
      out[i] = block;
    }
  }

  // Warps' results, then parts'.
  __device__ __forceinline__ void merge() {
    __syncthreads();  // the rings are done with
    shared_.warps.put(attention_, warp_);
    __syncthreads();
    const Results results(a_.results + row_ * parts_ * Results::kWords, part_, parts_, group_);
    shared_.warps.merge(
        [&](int head, int d, float4 o) { results.publish_outputs(head, d, o); },
        [&](int head, float top, float sum) { results.publish_total(head, top, sum); });
    if (part_ == 0 && sequence_.sparse) write_selection();  // while the others' results come
    results.gather(shared_.parts, [&](int head, int d, const SoftMaxResult& all) {
      store(head, d, all.o, all.top, all.sum);
    });
  }

  __device__ __forceinline__ void store(int head, int d, float4 o, float top, float sum) const {
    const int query_head = head_kv_ * group_ + head;
    const float factor = sum > 0 ? 1 / sum : 0;
    T* to = static_cast<T*>(a_.o) +
            (std::int64_t{sequence_.first_token} * a_.heads_q + query_head) * kDim + d;
    *reinterpret_cast<uint2*>(to) = {tile::pack2<T>(o.x * factor, o.y * factor),
                                     tile::pack2<T>(o.z * factor, o.w * factor)};
    if (d == 0 && a_.lse != nullptr) {
      a_.lse[std::int64_t{query_head} * a_.batch.num_tokens + sequence_.first_token] =
          sum > 0 ? (top + __log2f(sum)) * kLn2 : -kInfinity;
    }
  }

  const Args& a_;
  const Sequence& sequence_;
  S& shared_;
  const int warp_, lane_;
  const int part_, parts_;
  const int head_kv_, group_;
  const std::int64_t row_;  // among all (sequence, KV head)
  const int own_;           // block of the token
  const Forced forced_;
  const Windows fine_, normaliser_;
  const int counts_[kKinds];
  const WarpShare share_;
  int limit_;      // items that are known
  int ahead_ = 0;  // the item to be fetched next
  int used_ = 0;   // the item to be worked on next
  Normaliser normalisers_[2][2];
  WarpAttention<T, kDim> attention_;
};

// Grid: parts, KV heads, sequences.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    select_attend_kernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) std::byte memory[];
  Sequence sequence(a.batch, static_cast<int>(blockIdx.z));
  sequence.length = min(sequence.length, a.batch.max_kv_length);
  Part<T, kDim> part(a, sequence, *reinterpret_cast<Shared<T, kDim>*>(memory));
  if (sequence.tokens != 0) part.prepare();  // beside the end of the kernel before
  wait_for_previous();
  start_next();
  if (sequence.tokens != 0) part.run();
}

// How the device is shared out among the rows.
struct Sizes {
  Sizes(const Device& device, const SelectAttendParams& p)
      : rows(std::int64_t{p.attend.batch.num_sequences} * p.attend.pages.layout.kv_heads),
        key_stride(
            static_cast<int>(ceil_div(p.choose.select.blocks(), kItemBlocks) * kItemBlocks)) {
    const KvLayout& layout = p.attend.pages.layout;
    // Everybody merges something, and waits for everybody when it does.
    const std::int64_t outputs = p.attend.heads_q / layout.kv_heads * layout.head_dim / 4;
    parts = static_cast<int>(std::min<std::int64_t>(
        {device.sm_count / std::max<std::int64_t>(rows, 1), outputs, kMaxParts}));
  }

  std::int64_t keys() const { return rows * key_stride; }

  std::int64_t rows;
  int key_stride;
  int parts;
};

template <typename T, int kDim>
Status launch_rows(const Device& device, const Sizes& sizes, const Args& args) {
  const auto kernel = select_attend_kernel<T, kDim>;
  constexpr int kBytes = sizeof(Shared<T, kDim>);
  INFLLM_TRY(
      to_status("select_attend",
                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes)));
  const dim3 grid(static_cast<unsigned>(sizes.parts), static_cast<unsigned>(args.pool.map.heads),
                  static_cast<unsigned>(args.batch.num_sequences));
  return launch_parts(device, "select_attend", kernel, grid, kThreads, kBytes, 1, args,
                      /*all_at_once=*/true);
}

}  // namespace

std::size_t exchange_words(int sm_count) {
  return std::size_t{kRowHeads + kPartWords} * sm_count + kMaxKeys;
}

bool select_attends(const Backend& backend, const SelectAttendParams& p) {
  const Sizes sizes(device_of(backend), p);
  const KvLayout& layout = p.attend.pages.layout;
  return device_of(backend).exchange != nullptr && attends(backend, p.attend) &&
         scores(backend, p.choose) && sizes.parts >= kMinParts &&
         p.attend.heads_q / layout.kv_heads <= kRowHeads && p.attend.columns <= kMaxColumns &&
         sizes.keys() <= kMaxKeys && p.choose.score.config.score_rounding == ScoreRounding::kBF16;
}

Status select_attend(const Backend& backend, const SelectAttendParams& p, std::span<std::byte>) {
  const Device& device = device_of(backend);
  const Sizes sizes(device, p);
  const SparseConfig& config = p.choose.score.config;
  std::uint32_t* const results = device.exchange + kRowHeads * device.sm_count;
  const Args args{.pool = PagePool(p.attend.pages),
                  .batch = p.attend.batch,
                  .q_score = p.choose.score.q,
                  .q = p.attend.q,
                  .o = p.attend.o,
                  .lse = static_cast<float*>(p.attend.lse),
                  .selection = p.choose.select.selection,
                  .columns = p.choose.select.columns(),
                  .heads_q = p.attend.heads_q,
                  .score_scale = p.choose.score.scale * kLog2E,
                  .scale = p.attend.scale * kLog2E,
                  .init_blocks = config.init_blocks,
                  .local_blocks = config.local_blocks(),
                  .fine_normaliser = config.lse_source == LseSource::kFine,
                  .normalisers = device.exchange,
                  .results = results,
                  .keys = results + kPartWords * device.sm_count,
                  .key_stride = sizes.key_stride};
  return with_type(p.attend.pages.layout.dtype, [&](auto type) {
    using T = decltype(type);
    return p.attend.pages.layout.head_dim == 128 ? launch_rows<T, 128>(device, sizes, args)
                                                 : launch_rows<T, 64>(device, sizes, args);
  });
}

}  // namespace infllm::cuda::decode
