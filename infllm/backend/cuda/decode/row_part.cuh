// SPDX-License-Identifier: Apache-2.0
//
// What one thread block of the fused step does: one part of one row, from queries to outputs
// (docs/kernels/hopper-decode.md).
#pragma once

#include <climits>

#include "infllm/backend/cuda/decode/exchange.cuh"
#include "infllm/backend/cuda/decode/normaliser.cuh"
#include "infllm/backend/cuda/decode/part_attention.cuh"
#include "infllm/backend/cuda/decode/part_results.cuh"
#include "infllm/backend/cuda/decode/top_candidates.cuh"

namespace infllm::cuda::decode {

inline constexpr int kPartWarps = 8;
inline constexpr int kPartThreads = 32 * kPartWarps;
inline constexpr int kMaxColumns = kPartThreads;
inline constexpr int kItemBlocks = 8;  // that follow each other, and whose keys one warp finds
inline constexpr int kItemTiles = 4;   // which are four windows of each
static_assert(kItemTiles * kTileRows == kItemBlocks * kFineRows);
inline constexpr int kPrefetchedItems = 4;  // of a warp, before its turn

struct PartArgs {
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
  bool settled;  // SelectAttendParams::settled
  // What parts tell each other; kNothing everywhere between two launches, but for the set of
  // results that was used last. A part clears what it wrote: normalisers and keys at the end, since
  // whoever has sent results has read them, and results one launch later.
  std::uint32_t* normalisers;  // [rows][16][parts]
  std::uint32_t* results;      // of PartResults, [rows][parts]
  std::uint32_t* keys;         // [rows][key_stride], two halves each (top_candidates.cuh)
  int key_stride;
};

template <typename T, int kDim>
struct PartShared {
  typename PartAttention<T, kDim, kPartWarps>::Shared attention;
  TopCandidatesShared<kPartThreads> select;
  float2 of_warps[kPartWarps][kRowHeads];  // normalisers
  float lse[kRowHeads];
  alignas(16) std::int32_t list[kMaxColumns];  // the blocks chosen freely
};

// Pooled keys of one sequence and KV head.
struct Windows {
  std::int64_t offset;  // of the plane in a page
  int page_shift;       // logarithm of a page's rows
  int end;              // windows that exist
};

// This lane's row of a tile, and which lanes have one that exists; the others point somewhere.
template <typename T>
struct TileRow {
  const T* row;
  unsigned exist;
};

// One part of one row. Its warps are numbered through with those of the row's other parts, and
// whatever there is to read is dealt out to all of them.
template <typename T, int kDim>
class Part {
 public:
  using S = PartShared<T, kDim>;
  using Results = PartResults<kDim, kPartThreads>;

  __device__ __forceinline__ Part(const PartArgs& args, const Sequence& sequence, S& shared)
      : a_(args),
        sequence_(sequence),
        shared_(shared),
        warp_(static_cast<int>(threadIdx.x / 32)),
        lane_(static_cast<int>(threadIdx.x % 32)),
        part_(static_cast<int>(blockIdx.x)),
        parts_(static_cast<int>(gridDim.x)),
        place_(kPartWarps * part_ + warp_),
        places_(kPartWarps * parts_),
        head_kv_(static_cast<int>(blockIdx.y)),
        group_(args.heads_q / args.pool.map.heads),
        row_(static_cast<int>(blockIdx.z) * args.pool.map.heads + head_kv_),
        own_((sequence.length - 1) / kPageTokens),
        forced_(own_, args.init_blocks, args.local_blocks,
                sequence.sparse ? args.columns : INT_MAX),
        fine_{args.pool.map.fine(head_kv_), kFineShift, fine_windows(sequence.length)},
        normaliser_(args.fine_normaliser ? fine_
                                         : Windows{args.pool.map.coarse(head_kv_), kCoarseShift,
                                                   coarse_windows(sequence.length)}),
        normaliser_tiles_((normaliser_.end + kTileRows - 1) / kTileRows),
        score_items_((candidates_end() + kItemBlocks - 1) / kItemBlocks),
        forced_slices_(share_of_slices(forced_.count())),
        free_slices_(share_of_slices(forced_.free)),
        score_scale_(args.score_scale),
        attention_(shared.attention, args.scale) {}

  // What needs only the batch's arrays, beside the end of the kernel before: where the first rows
  // are, and those themselves that it does not write.
  __device__ __forceinline__ void prepare() {
    shared_.select.clear();
    if (chooses()) {
#pragma unroll
      for (int t = 0; t < kItemTiles; ++t) {
        first_fine_[t] = find_row(fine_, fine_tile(place_, t));
      }
      first_normaliser_ = find_row(normaliser_, place_);
      prefetch_rows();
    }
    first_slice_ = find_slice(/*free=*/false, 0);
    if (first_slice_.tokens > 0 && lane_ < 2) {
      prefetch(lane_ == 0 ? first_slice_.keys : first_slice_.values,
               kSliceTokens * kDim * static_cast<int>(sizeof(T)));
    }
    const bool early = a_.settled && !has_newest();
    if (!early) {
      wait_for_previous();
      load_queries();
    }
    load_first();
    if (early) {
      wait_for_previous();
      load_queries();
    }
  }

  __device__ __forceinline__ void run() {
    // What the kernel behind reads before its turn is in the way of long rows' windows.
    const bool is_long = score_items_ > 2 * places_;
    if (!is_long) start_next();
    std::uint32_t* const words = a_.results + row_ * parts_ * kPartWords;
    const std::uint32_t count = Results::look_at_count(words, parts_);
    float x[kItemTiles][4];
    if (chooses()) {
      score_first(x);
      if (a_.q != a_.q_score) q_.load(queries(a_.q), group_);
    }
    attend_slices(/*free=*/false, forced_slices_);  // while normalisers come
    if (chooses()) publish_scores(x);
    if (is_long) start_next();
    const Results results(words, part_, parts_, count);
    results.clear();                  // while keys come
    if (!chooses()) __syncthreads();  // as there is one before the list otherwise
    if (chooses()) attend_to_chosen();
    publish_results(results);
    if (part_ == 0 && sequence_.sparse && !chooses()) write_selection();
    gather_results(results);
    if (warp_ > 0) return;
    if (lane_ == 0) results.count();
    if (chooses()) clear_cells();
  }

 private:
  // Sixteen tokens of a block.
  struct Slice {
    const T* keys;
    const T* values;  // some address if there are no tokens
    int tokens;
    int block;
  };

  __device__ __forceinline__ bool chooses() const { return forced_.free > 0; }
  // Blocks from here on are forced, or come after the token's own.
  __device__ __forceinline__ int candidates_end() const {
    return max(0, own_ + 1 - a_.local_blocks);
  }
  // Slices are dealt out to the parts, and by these to their warps.
  __device__ __forceinline__ int share_of_slices(int blocks) const {
    const unsigned slices = static_cast<unsigned>(blocks) * kBlockSlices;
    return static_cast<int>((slices + parts_ - 1 - part_) / static_cast<unsigned>(parts_));
  }
  __device__ __forceinline__ const T* queries(const void* all) const {
    return static_cast<const T*>(all) +
           (std::int64_t{sequence_.first_token} * a_.heads_q + head_kv_ * group_) * kDim;
  }
  __device__ __forceinline__ std::uint32_t* normaliser_cell(int head, int part) const {
    return a_.normalisers + (row_ * kRowHeads + head) * parts_ + part;
  }
  __device__ __forceinline__ std::uint32_t* keys() const { return a_.keys + row_ * a_.key_stride; }

  // Tile t of an item.
  __device__ __forceinline__ static int fine_tile(int item, int t) { return kItemTiles * item + t; }

  __device__ __forceinline__ TileRow<T> find_row(const Windows& windows, int tile) const {
    const int window = kTileRows * tile + lane_ / 4;
    const int page =
        window < windows.end ? sequence_.page(window >> windows.page_shift, a_.pool.num_pages) : -1;
    const T* const row = a_.pool.template plane<const T>(page, windows.offset) +
                         (window & ((1 << windows.page_shift) - 1)) * kDim;
    return {page < 0 ? static_cast<const T*>(a_.q) : row, __ballot_sync(kAllLanes, page >= 0)};
  }

  // The first rows, and some that come behind, into L2.
  __device__ __forceinline__ void prefetch_rows() const {
    if (lane_ % 4 == 0) {
      prefetch(first_normaliser_.row, kDim * static_cast<int>(sizeof(T)));
      if (lane_ / 4 % kFineRows == 0) {  // all of a page's
#pragma unroll
        for (int t = 0; t < kItemTiles; ++t) {
          if ((first_fine_[t].exist >> lane_ & 1) != 0) {
            prefetch(first_fine_[t].row, kFineRows * kDim * static_cast<int>(sizeof(T)));
          }
        }
      }
    }
#pragma unroll 1
    for (int n = 1; n < kPrefetchedItems; ++n) {
      const int item = n * places_ + place_;
      if (item >= score_items_) break;
      // Lanes 0, 1, ... 7 for the item's blocks.
      const int page = lane_ < kItemBlocks && kFineRows * (kItemBlocks * item + lane_) < fine_.end
                           ? sequence_.page(kItemBlocks * item + lane_, a_.pool.num_pages)
                           : -1;
      if (page >= 0) {
        prefetch(a_.pool.template plane<const T>(page, fine_.offset),
                 kFineRows * kDim * static_cast<int>(sizeof(T)));
      }
    }
  }

  // One that will probably be attended to.
  __device__ __forceinline__ void prefetch_block(int block) const {
    const int page = sequence_.page(block, a_.pool.num_pages);
    if (page < 0) return;
    const int bytes = static_cast<int>(a_.pool.map.plane_bytes());
    prefetch(a_.pool.template plane<const T>(page, a_.pool.map.key(head_kv_)), bytes);
    prefetch(a_.pool.template plane<const T>(page, a_.pool.map.value(head_kv_)), bytes);
  }

  // Slice of the warp in a round of forced or of chosen blocks.
  __device__ __forceinline__ Slice find_slice(bool free, int round) const {
    const T* const any = static_cast<const T*>(a_.q);
    const int mine = kPartWarps * round + warp_;
    if (mine >= (free ? free_slices_ : forced_slices_)) return {any, any, 0, -1};
    const int slice = part_ + parts_ * mine;
    const int i = slice / kBlockSlices;
    const int block = free ? shared_.list[i] : forced_.block(i);
    const int first = slice % kBlockSlices * kSliceTokens;
    const int tokens = min(kSliceTokens, sequence_.length - block * kPageTokens - first);
    const int page = sequence_.page(block, a_.pool.num_pages);
    if (page < 0 || tokens <= 0) return {any, any, 0, -1};
    return {a_.pool.template plane<const T>(page, a_.pool.map.key(head_kv_)) + first * kDim,
            a_.pool.template plane<const T>(page, a_.pool.map.value(head_kv_)) + first * kDim,
            tokens, block};
  }
  __device__ __forceinline__ void fetch(const Slice& slice) {
    attention_.fetch(slice.keys, slice.values, slice.tokens);
  }

  // Whether what this warp reads first has a row that the step's token may have just written: of
  // its own block, or of a window that ends with it.
  __device__ __forceinline__ bool has_newest() const {
    return place_ + 1 == normaliser_tiles_ || first_slice_.block == own_ ||
           (place_ < score_items_ && kItemTiles * kTileRows * (place_ + 1) >= fine_.end);
  }
  __device__ __forceinline__ void load_queries() {
    q_.load(queries(chooses() ? a_.q_score : a_.q), group_);
  }
  __device__ __forceinline__ void load_first() {
    if (chooses()) {
      if (place_ < normaliser_tiles_) normaliser_rows_.load(first_normaliser_.row);
      if (place_ < score_items_) {
#pragma unroll
        for (int t = 0; t < kItemTiles; ++t) rows_[t].load(first_fine_[t].row);
      }
    }
    if (forced_slices_ > 0) fetch(first_slice_);
  }

  // From queries to normalisers, and the first logits, which are there before they can be
  // normalised.
  __device__ __forceinline__ void score_first(float (&x)[kItemTiles][4]) {
    if (place_ < normaliser_tiles_) normalise(normaliser_rows_, first_normaliser_.exist);
    if (place_ + places_ < normaliser_tiles_) normalise_more();
    publish_normalisers();
    warmed_ = warm_page_table();
    if (place_ < score_items_) multiply(rows_, x);
  }

  // From normalisers to keys.
  __device__ __forceinline__ void publish_scores(const float (&x)[kItemTiles][4]) {
    gather_normalisers();
    shared_.list[threadIdx.x] = warmed_;  // where nobody looks before the choice
    if (place_ < score_items_) {
      unsigned exist[kItemTiles];
#pragma unroll
      for (int t = 0; t < kItemTiles; ++t) exist[t] = first_fine_[t].exist;
      publish_keys(x, exist, place_);
    }
    if (place_ + places_ < score_items_) {
      if (a_.q != a_.q_score) q_.load(queries(a_.q_score), group_);
      score_more(rows_);
      if (a_.q != a_.q_score) q_.load(queries(a_.q), group_);
    }
  }

  __device__ __forceinline__ void multiply(const DirectTile<T, kDim> (&rows)[kItemTiles],
                                           float (&x)[kItemTiles][4]) const {
#pragma unroll
    for (int t = 0; t < kItemTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 4; ++j) x[t][j] = 0;
    }
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
#pragma unroll
      for (int t = 0; t < kItemTiles; ++t) rows[t].add_products(q_, i, x[t]);
    }
  }

  // The items behind the first one; each is asked for while the one before is worked on.
  __device__ __forceinline__ void score_more(DirectTile<T, kDim> (&rows)[kItemTiles]) {
    TileRow<T> next[kItemTiles];
    unsigned exist[kItemTiles];
    const auto load = [&](int item) {
#pragma unroll
      for (int t = 0; t < kItemTiles; ++t) {
        next[t] = find_row(fine_, fine_tile(item, t));
        rows[t].load(next[t].row);
      }
    };
    int item = place_ + places_;
    load(item);
#pragma unroll 1
    for (; item < score_items_; item += places_) {
      float x[kItemTiles][4];
      multiply(rows, x);
#pragma unroll
      for (int t = 0; t < kItemTiles; ++t) exist[t] = next[t].exist;
      load(item + places_ < score_items_ ? item + places_ : item);
      publish_keys(x, exist, item);
    }
  }

  __device__ __forceinline__ void normalise(const DirectTile<T, kDim>& rows, unsigned exist) {
    float x[4] = {};
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) rows.add_products(q_, i, x);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      normalisers_[r].add(has_column(exist, 0) ? x[2 * r] * score_scale_ : -kInfinity,
                          has_column(exist, 1) ? x[2 * r + 1] * score_scale_ : -kInfinity);
    }
  }
  // The tiles behind the first one, four at a time.
  __device__ __forceinline__ void normalise_more() {
#pragma unroll 1
    for (int tile = place_ + places_; tile < normaliser_tiles_; tile += 4 * places_) {
      DirectTile<T, kDim> rows[4];
      unsigned exist[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const TileRow<T> found = find_row(normaliser_, tile + t * places_);
        exist[t] = found.exist;
        if (found.exist != 0) rows[t].load(found.row);
      }
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        if (exist[t] != 0) normalise(rows[t], exist[t]);
      }
    }
  }

  // This part's normalisers of all heads, for all parts.
  __device__ __forceinline__ void publish_normalisers() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      normalisers_[r].template merge_lanes<1, 4>();
      if (lane_ % 4 == 0) {
        shared_.of_warps[warp_][lane_ / 4 + 8 * r] = {normalisers_[r].top, normalisers_[r].sum};
      }
    }
    __syncthreads();
    if (threadIdx.x >= kRowHeads * kPartWarps) return;
    const int head = static_cast<int>(threadIdx.x / kPartWarps);
    const float2 one = shared_.of_warps[threadIdx.x % kPartWarps][head];
    Normaliser all;
    all.top = one.x;
    all.sum = one.y;
    all.template merge_lanes<1, kPartWarps>();
    if (threadIdx.x % kPartWarps == 0) publish(normaliser_cell(head, part_), word_of(all.lse()));
  }

  // Brings the page table into L1, so that the pages of the chosen blocks are looked up without
  // delay. Returns something that must be used, or there is no such load.
  __device__ __forceinline__ std::int32_t warm_page_table() const {
    constexpr int kSector = 8;
    const int block = min(kSector * static_cast<int>(threadIdx.x), sequence_.max_pages - 1);
    std::int32_t page;
    asm volatile("ld.global.ca.b32 %0, [%1];" : "=r"(page) : "l"(sequence_.table + block));
    return page;
  }

  // The logarithm of every head's sum over all parts; heads that do not exist, or that have nothing
  // to be normalised by, get +inf and so no weight.
  __device__ __forceinline__ void gather_normalisers() {
    constexpr int kLanes = kPartThreads / kRowHeads;
    const int head = static_cast<int>(threadIdx.x / kLanes);
    const int lane = static_cast<int>(threadIdx.x % kLanes);
    const int count = (parts_ - lane + kLanes - 1) / kLanes;
    std::uint32_t words[kMaxResultParts / kLanes];
    take(normaliser_cell(head, lane), kLanes, count, words);
    Normaliser all;
#pragma unroll
    for (int i = 0; i < kMaxResultParts / kLanes; ++i) {
      if (i < count) all.top = fmaxf(all.top, __uint_as_float(words[i]));
    }
    const float base = all.top == -kInfinity ? 0 : all.top;
#pragma unroll
    for (int i = 0; i < kMaxResultParts / kLanes; ++i) {
      if (i < count) all.sum += tile::fast_exp2(__uint_as_float(words[i]) - base);
    }
    all.template merge_lanes<1, kLanes>();
    if (lane == 0) shared_.lse[head] = head < group_ && all.sum > 0 ? all.lse() : kInfinity;
    __syncthreads();
  }

  // Keys of the eight blocks of an item.
  __device__ __forceinline__ void publish_keys(const float (&x)[kItemTiles][4],
                                               const unsigned (&exist)[kItemTiles],
                                               int item) const {
    const float lse[2] = {shared_.lse[lane_ / 4], shared_.lse[lane_ / 4 + 8]};
    float s[2 * kItemTiles];  // of window 8 t + 2 (lane % 4) + j, two of its heads
#pragma unroll
    for (int t = 0; t < kItemTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        s[2 * t + j] = tile::fast_exp2(x[t][j] * score_scale_ - lse[0]) +
                       tile::fast_exp2(x[t][2 + j] * score_scale_ - lse[1]);
      }
    }
    // Over the lanes that have the other heads; each keeps half of its windows, three times, and so
    // one in the end: t is lane / 8, j is lane / 4 % 2.
#pragma unroll
    for (int half = kItemTiles; half > 0; half /= 2) {
      const bool upper = (lane_ & 4 * half) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float given = upper ? s[i] : s[half + i];
        s[i] = (upper ? s[half + i] : s[i]) + __shfl_xor_sync(kAllLanes, given, 4 * half);
      }
    }
    const unsigned low = (lane_ & 8) == 0 ? exist[0] : exist[1];
    const unsigned high = (lane_ & 8) == 0 ? exist[2] : exist[3];
    const bool exists = has_column((lane_ & 16) == 0 ? low : high, lane_ / 4 % 2);
    const std::uint32_t last = exists ? sort_key(s[0], true) : 0;
    std::uint32_t best = max(last, __shfl_xor_sync(kAllLanes, last, 1));
    best = max(best, __shfl_xor_sync(kAllLanes, best, 4));
    if (lane_ % 2 == 0) return;
    const int block = kItemBlocks * item + lane_ / 8 * 2 + lane_ / 2 % 2;
    if ((lane_ & 4) == 0) {
      publish(best_half(keys(), block), best);
    } else if (block + 1 < kItemBlocks * score_items_) {  // has the last window of a block
      publish(overlap_half(keys(), block + 1), last);
    } else {
      publish(overlap_half(keys(), 0), 0);
    }
  }

  // Probable ones are on their way into L2 while the choice is made.
  __device__ __forceinline__ void attend_to_chosen() {
    TopCandidates<kPartThreads>(keys(), a_.init_blocks, candidates_end(), shared_.select)
        .choose(forced_.free, shared_.list, [&](int block, int i) {
          if (static_cast<unsigned>(i) % static_cast<unsigned>(parts_) == part_)
            prefetch_block(block);
        });
    if (free_slices_ > 0) fetch(find_slice(/*free=*/true, 0));
    if (part_ == 0) write_selection();  // while they come
    attend_slices(/*free=*/true, free_slices_);
  }
  // Whose first round is on its way.
  __device__ __forceinline__ void attend_slices(bool free, int slices) {
#pragma unroll 1
    for (int left = slices, round = 1; left > 0; left -= kPartWarps, ++round) {
      attention_.attend(q_, min(left, kPartWarps), [&] {
        if (left > kPartWarps) {
          fetch(find_slice(free, round));
        } else {
          tile::cp_async_commit();
        }
      });
    }
  }

  __device__ __forceinline__ void publish_results(const Results& to) const {
    using Attention = PartAttention<T, kDim, kPartWarps>;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int head = lane_ / 4 + 8 * r;
      const float sum = attention_.sum(r);
      if (head >= group_) continue;
#pragma unroll
      for (int t = 0; t < Attention::kTiles; ++t) {
        const int octet = head * Results::kHeadOctets + Attention::kTiles * warp_ + t;
        to.publish_outputs(octet, lane_ % 4, attention_.output(t, r));
        if (lane_ % 4 == 0) to.publish_total(octet, attention_.top(r), sum);
      }
    }
  }

  __device__ __forceinline__ void gather_results(const Results& from) const {
    const int octets = group_ * Results::kHeadOctets;
#pragma unroll 1
    for (int octet = part_ + parts_ * warp_; octet < octets; octet += places_) {
      from.gather(octet, [&](int i, float o, float top, float sum) {
        store(octet / Results::kHeadOctets, octet % Results::kHeadOctets * 8 + i, o, top, sum);
      });
    }
  }

  __device__ __forceinline__ void store(int head, int d, float o, float top, float sum) const {
    const int query_head = head_kv_ * group_ + head;
    static_cast<T*>(
        a_.o)[(std::int64_t{sequence_.first_token} * a_.heads_q + query_head) * kDim + d] =
        static_cast<T>(sum > 0 ? o / sum : 0);
    if (d == 0 && a_.lse != nullptr) {
      a_.lse[std::int64_t{query_head} * a_.batch.num_tokens + sequence_.first_token] =
          sum > 0 ? (top + __log2f(sum)) * kLn2 : -kInfinity;
    }
  }

  // Ascending, -1 behind the last one.
  __device__ __forceinline__ void write_selection() const {
    std::int32_t* const out =
        a_.selection +
        (std::int64_t{head_kv_} * a_.batch.num_tokens + sequence_.first_token) * a_.columns;
    for (int i = static_cast<int>(threadIdx.x); i < a_.columns; i += kPartThreads) {
      if (i < forced_.free) {
        const int block = shared_.list[i];
        int before = 0;
#pragma unroll 4
        for (int j = 0; j < forced_.free; ++j) before += shared_.list[j] < block ? 1 : 0;
        out[forced_.sinks + before] = block;
      } else {
        const int n = i - forced_.free;  // among the forced ones
        const int local = forced_.first_local + n - forced_.sinks;
        out[n < forced_.sinks ? n : i] = n < forced_.sinks ? n : local <= own_ ? local : -1;
      }
    }
  }

  // Every part has sent its results to this warp, so none looks at normalisers and keys any more.
  __device__ __forceinline__ void clear_cells() const {
    if (lane_ < kRowHeads) publish(normaliser_cell(lane_, part_), kNothing);
#pragma unroll 1
    for (int first = place_; first < score_items_; first += places_) {
      // Eight items of eight blocks, one for each warp.
      if (lane_ < 16 && first + lane_ / 2 < score_items_) {
        publish(keys() + kItemBlocks * first + 4 * lane_,
                make_uint4(kNothing, kNothing, kNothing, kNothing));
      }
    }
  }

  static constexpr int kBlockSlices = kPageTokens / kSliceTokens;

  const PartArgs& a_;
  const Sequence& sequence_;
  S& shared_;
  const int warp_, lane_;
  const int part_, parts_;
  const int place_, places_;  // among the row's warps
  const int head_kv_, group_;
  const int row_;  // among all (sequence, KV head)
  const int own_;  // block of the token
  const Forced forced_;
  const Windows fine_, normaliser_;
  const int normaliser_tiles_;
  const int score_items_;
  const int forced_slices_, free_slices_;  // of this part
  TileRow<T> first_normaliser_;
  TileRow<T> first_fine_[kItemTiles];
  Slice first_slice_;
  std::int32_t warmed_;
  DirectTile<T, kDim> normaliser_rows_;
  DirectTile<T, kDim> rows_[kItemTiles];
  const float score_scale_;
  Normaliser normalisers_[2];
  HeadQueries<T, kDim> q_;
  PartAttention<T, kDim, kPartWarps> attention_;
};

}  // namespace infllm::cuda::decode
