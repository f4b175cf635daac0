// SPDX-License-Identifier: Apache-2.0
//
// A whole step (step_args.cuh) of few rows: what one thread block does, one part of one row, from
// queries to outputs. The warps of all parts of a row share out what there is to read, so that each
// has little more than one item of windows and one slice of tokens, which it asks for early:
//
//   prepare()   the first windows and the first forced slice, while the kernel in front ends
//   run()       normalisers and first logits | forced blocks | keys | the choice | chosen blocks |
//               results
#pragma once

#include "infllm/backend/cuda/decode/part_attention.cuh"
#include "infllm/backend/cuda/decode/step_part.cuh"
#include "infllm/backend/cuda/decode/top_candidates.cuh"

namespace infllm::cuda::decode {

inline constexpr int kPrefetchedItems = 4;  // of a warp, before its turn

template <typename T, int kDim>
struct PartShared {
  typename PartAttention<T, kDim, kStepWarps>::Shared attention;
  StepShared step;
  alignas(16) std::int32_t list[kMaxColumns];  // the blocks chosen freely
  TopCandidatesShared<kStepThreads> select;
};

// This lane's row of a tile, and which lanes have one that exists; the others point somewhere.
template <typename T>
struct TileRow {
  const T* row;
  unsigned exist;
};

template <typename T, int kDim>
class RowPart : private StepPart {
 public:
  using S = PartShared<T, kDim>;
  using Results = PartResults<kDim, kStepThreads>;

  __device__ __forceinline__ RowPart(const StepArgs& args, const Sequence& sequence, int row,
                                     int head_kv, int part, S& shared)
      : StepPart(args, sequence, row, head_kv, part, shared.step),
        shared_(shared),
        normaliser_tiles_((normaliser_.end + kTileRows - 1) / kTileRows),
        forced_slices_(share_of_slices(forced_.count())),
        free_slices_(share_of_slices(forced_.free)),
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
      load_queries(chooses() ? a_.q_score : a_.q);
    }
    load_first();
    if (early) {
      wait_for_previous();
      load_queries(chooses() ? a_.q_score : a_.q);
    }
  }

  __device__ __forceinline__ void run() {
    // What the kernel behind reads before its turn is in the way of long rows' windows.
    const bool is_long = items_ > 2 * places_;
    if (!is_long) start_next();
    const std::uint32_t count = Results::look_at_count(result_words(), parts_);
    float x[kItemTiles][4];
    if (chooses()) {
      score_first(x);
      if (a_.q != a_.q_score) load_queries(a_.q);
    }
    attend_slices(/*free=*/false, forced_slices_);  // while normalisers come
    if (chooses()) publish_scores(x);
    if (is_long) start_next();
    const Results results(result_words(), part_, parts_, count);
    results.clear();                  // while keys come
    if (!chooses()) __syncthreads();  // as there is one before the list otherwise
    if (chooses()) attend_to_chosen();
    publish_results(results);
    if (part_ == 0 && sequence_.sparse && !chooses()) write_selection(shared_.list);
    gather_results(results);
    if (warp_ > 0) return;
    results.count();
    if (chooses()) clear_cells(32 * part_ + lane_, 32 * parts_);
  }

 private:
  // Sixteen tokens of a block.
  struct Slice {
    const T* keys;
    const T* values;  // some address if there are no tokens
    int tokens;
    int block;
  };

  // Slices are dealt out to the parts, and by these to their warps.
  __device__ __forceinline__ int share_of_slices(int blocks) const {
    const unsigned slices = static_cast<unsigned>(blocks) * kBlockSlices;
    return static_cast<int>((slices + parts_ - 1 - part_) / static_cast<unsigned>(parts_));
  }
  // Tile t of an item.
  __device__ __forceinline__ static int fine_tile(int item, int t) { return kItemTiles * item + t; }

  __device__ __forceinline__ TileRow<T> find_row(const PooledRows& windows, int tile) const {
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
      if (item >= items_) break;
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
    const int mine = kStepWarps * round + warp_;
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
           (place_ < items_ && kItemTiles * kTileRows * (place_ + 1) >= fine_.end);
  }
  __device__ __forceinline__ void load_queries(const void* all) {
    q_.load(queries<T, kDim>(all), group_);
  }
  __device__ __forceinline__ void load_first() {
    if (chooses()) {
      if (place_ < normaliser_tiles_) normaliser_rows_.load(first_normaliser_.row);
      if (place_ < items_) {
#pragma unroll
        for (int t = 0; t < kItemTiles; ++t) rows_[t].load(first_fine_[t].row);
      }
    }
    if (forced_slices_ > 0) fetch(first_slice_);
  }

  // From queries to normalisers, and the first logits, which are there before they can be
  // normalised.
  __device__ __forceinline__ void score_first(float (&x)[kItemTiles][4]) {
    if (place_ < normaliser_tiles_) add_tile(normaliser_rows_, first_normaliser_.exist);
    if (place_ + places_ < normaliser_tiles_) normalise_more();
    publish_normalisers();
    warmed_ = warm_page_table();
    if (place_ < items_) multiply(rows_, q_, x);
  }

  // From normalisers to keys.
  __device__ __forceinline__ void publish_scores(const float (&x)[kItemTiles][4]) {
    gather_normalisers<kMaxResultParts>();
    shared_.list[threadIdx.x] = warmed_;  // where nobody looks before the choice
    if (place_ < items_) {
      unsigned exist[kItemTiles];
#pragma unroll
      for (int t = 0; t < kItemTiles; ++t) exist[t] = first_fine_[t].exist;
      score_item(x, exist, place_);
    }
    if (place_ + places_ < items_) {
      if (a_.q != a_.q_score) load_queries(a_.q_score);
      score_more(rows_);
      if (a_.q != a_.q_score) load_queries(a_.q);
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
    for (; item < items_; item += places_) {
      float x[kItemTiles][4];
      multiply(rows, q_, x);
#pragma unroll
      for (int t = 0; t < kItemTiles; ++t) exist[t] = next[t].exist;
      load(item + places_ < items_ ? item + places_ : item);
      score_item(x, exist, item);
    }
  }

  __device__ __forceinline__ void add_tile(const DirectTile<T, kDim>& rows, unsigned exist) {
    float x[4] = {};
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) rows.add_products(q_, i, x);
    normalise(x, has_column(exist, 0), has_column(exist, 1));
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
        if (exist[t] != 0) add_tile(rows[t], exist[t]);
      }
    }
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

  __device__ __forceinline__ void score_item(const float (&x)[kItemTiles][4],
                                             const unsigned (&exist)[kItemTiles], int item) const {
    const float s = score(x);
    const unsigned low = (lane_ & 8) == 0 ? exist[0] : exist[1];
    const unsigned high = (lane_ & 8) == 0 ? exist[2] : exist[3];
    publish_keys(s, has_column((lane_ & 16) == 0 ? low : high, lane_ / 4 % 2), item);
  }

  // Probable ones are on their way into L2 while the choice is made.
  __device__ __forceinline__ void attend_to_chosen() {
    TopCandidates<kStepThreads>(keys(), a_.init_blocks, candidates_end_, shared_.select)
        .choose(forced_.free, shared_.list, [&](int block, int i) {
          if (static_cast<unsigned>(i) % static_cast<unsigned>(parts_) == part_)
            prefetch_block(block);
        });
    if (free_slices_ > 0) fetch(find_slice(/*free=*/true, 0));
    if (part_ == 0) write_selection(shared_.list);  // while they come
    attend_slices(/*free=*/true, free_slices_);
  }
  // Whose first round is on its way.
  __device__ __forceinline__ void attend_slices(bool free, int slices) {
#pragma unroll 1
    for (int left = slices, round = 1; left > 0; left -= kStepWarps, ++round) {
      attention_.attend(q_, min(left, kStepWarps), [&] {
        if (left > kStepWarps) {
          fetch(find_slice(free, round));
        } else {
          tile::cp_async_commit();
        }
      });
    }
  }

  __device__ __forceinline__ void publish_results(const Results& to) const {
    using Attention = PartAttention<T, kDim, kStepWarps>;
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
    *output<T, kDim>(head, d) = static_cast<T>(sum > 0 ? o / sum : 0);
    if (d == 0) store_lse(head, top, sum);
  }

  S& shared_;
  const int normaliser_tiles_;
  const int forced_slices_, free_slices_;  // of this part
  TileRow<T> first_normaliser_;
  TileRow<T> first_fine_[kItemTiles];
  Slice first_slice_;
  std::int32_t warmed_;
  DirectTile<T, kDim> normaliser_rows_;
  DirectTile<T, kDim> rows_[kItemTiles];
  HeadQueries<T, kDim> q_;
  PartAttention<T, kDim, kStepWarps> attention_;
};

}  // namespace infllm::cuda::decode
