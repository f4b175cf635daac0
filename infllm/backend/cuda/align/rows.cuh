// SPDX-License-Identifier: Apache-2.0
//
// How the kernels of align cut their work: a tile is as many neighbouring entries of the list of
// rows as have 128 query heads together, and one KV head. A tile visits the sequences that its
// entries belong to, as a rule one, in turn. Where entries stand is looked up once, by find_places.
#pragma once

#include "infllm/backend/cuda/page.cuh"
#include "infllm/backend/cuda/powers.cuh"
#include "infllm/backend/cuda/sm80/warp_products.cuh"
#include "infllm/ops/align.h"

namespace infllm::cuda::align {

using sm80::SmemTile;

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kTileRows = 128;
constexpr int kWarpRows = kTileRows / kWarps;
constexpr int kTileKeys = 64;
constexpr int kTileBlocks = kTileKeys / kFineRows;  // that begin in a tile of windows
constexpr int kScoreStride = kTileKeys + 1;         // of a tile of floats in shared memory

// Of an entry of the list.
struct RowPlace {
  std::int32_t token;
  std::int32_t sequence;  // -1: no row, or one without choosable blocks
  std::int32_t position;
  std::int32_t end_block;  // F is init_blocks .. end_block - 1
};

struct AlignArgs {
  PagePool pool;
  Batch batch;
  const void* q;        // of attention
  const void* q_score;  // of the scores
  const std::int32_t* rows;
  RowPlace* places;  // [R]
  float* norms;      // [Hq, R]
  float* grad_scores;
  std::int32_t* windows;
  int num_rows;
  int heads_q;
  int group;
  int tile_entries;
  int blocks;  // N
  int init_blocks;
  int local_blocks;
  bool from_coarse;
  float scale;
  float c;  // exponent_of(scale)
};

AlignArgs align_args(const AlignParams& params, RowPlace* places);

// Writes the places of all entries.
Status find_places(const Backend& backend, std::string_view step, const AlignArgs& args);

inline std::int64_t tiles_of(const AlignArgs& a) {
  return ceil_div(a.num_rows, std::int64_t{a.tile_entries});
}

// Fine or coarse pooled keys of a head.
struct Pooled {
  __device__ Pooled(const AlignArgs& a, bool is_coarse, int head)
      : coarse(is_coarse),
        rows(is_coarse ? kCoarseRows : kFineRows),
        plane(is_coarse ? a.pool.map.coarse(head) : a.pool.map.fine(head)) {}
  // Those whose last token is within the first `length` ones.
  __device__ int count(int length) const {
    return coarse ? coarse_windows(length) : fine_windows(length);
  }
  bool coarse;
  int rows;  // in a page
  std::int64_t plane;
};

__device__ inline Pooled normaliser(const AlignArgs& a, int head) {
  return Pooled(a, a.from_coarse, head);
}

// A thread block's tile of entries, and the run of them that is being visited.
struct EntryTile {
  __device__ EntryTile(const AlignArgs& a, int tile)
      : first(tile * a.tile_entries), entries(min(a.tile_entries, a.num_rows - first)) {}
  int first;  // in the list
  int entries;
};

// A sequence that some of the tile's entries belong to.
struct Visit {
  int sequence;   // -1: there is no other one
  int length;     // keys up to the last row
  int end_block;  // the largest of the rows
};

// The first one after sequence `last`.
__device__ inline Visit next_visit(const RowPlace* places, const EntryTile& tile, int last) {
  Visit visit{-1, 0, 0};
  for (int i = 0; i < tile.entries; ++i) {
    const RowPlace& place = places[i];
    if (place.sequence <= last) continue;
    if (visit.sequence < 0 || place.sequence < visit.sequence) visit = {place.sequence, 0, 0};
    if (place.sequence != visit.sequence) continue;
    visit.length = max(visit.length, place.position + 1);
    visit.end_block = max(visit.end_block, place.end_block);
  }
  return visit;
}

// The fine windows that the choosable blocks of a visit need, from the first one of a tile on. A
// window belongs to the block that it begins in and may reach into the next one.
struct WindowRange {
  __device__ WindowRange(const AlignArgs& a, const Pooled& fine, const Visit& visit)
      : begin(max(0, a.init_blocks * kFineRows - 1) / kTileKeys * kTileKeys),
        end(min(visit.end_block * kFineRows, fine.count(visit.length))) {}
  int begin;
  int end;
};

// Everybody copies; the caller synchronises.
__device__ inline void load_places(const AlignArgs& a, const EntryTile& tile, RowPlace* to) {
  for (int i = static_cast<int>(threadIdx.x); i < tile.entries; i += kThreads) {
    to[i] = a.places[tile.first + i];
  }
}

// Starts the copy of the tile's queries, zeros for what is no row.
template <typename T, int D>
__device__ void load_queries(const AlignArgs& a, const EntryTile& tile, const RowPlace* places,
                             const void* q, int head, std::byte* to) {
  constexpr int kPieces = SmemTile<D>::kPieces;
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kPieces; i += kThreads) {
    const int row = i / kPieces;
    const int piece = i % kPieces;
    const int entry = row / a.group;
    const bool is_row = entry < tile.entries && places[entry].sequence >= 0;
    const std::int64_t token = is_row ? places[entry].token : 0;
    const std::int64_t query = is_row ? head * a.group + row - entry * a.group : 0;
    tile::cp_async_16(to + SmemTile<D>::offset(row, piece),
                      static_cast<const T*>(q) + (token * a.heads_q + query) * D + piece * 8,
                      is_row);
  }
}

// Starts the copy of 64 pooled keys from `first` on; zeros from `end` on and for pages that are
// not there.
template <int D>
__device__ void load_pooled(const AlignArgs& a, const Sequence& sequence, const Pooled& keys,
                            int first, int end, std::byte* to) {
  constexpr int kPieces = SmemTile<D>::kPieces;
  constexpr int kRowBytes = SmemTile<D>::kRowBytes;
  for (int i = static_cast<int>(threadIdx.x); i < kTileKeys * kPieces; i += kThreads) {
    const int row = i / kPieces;
    const int piece = i % kPieces;
    const int window = first + row;
    const int page = window < end ? sequence.page(window / keys.rows, a.pool.num_pages) : -1;
    const auto* from = a.pool.plane<const std::byte>(max(page, 0), keys.plane);
    tile::cp_async_16(to + SmemTile<D>::offset(row, piece),
                      from + window % keys.rows * kRowBytes + piece * 16, page >= 0);
  }
}

// Calls body(first key of a tile, the tile) for the pooled keys first .. end - 1. A barrier lies
// between two calls, and before the return.
template <int D, typename Body>
__device__ void for_each_tile(const AlignArgs& a, const Sequence& sequence, const Pooled& keys,
                              int first, int end, std::byte (&ring)[2][kTileKeys * 2 * D],
                              Body&& body) {
  const auto load = [&](int key) {
    if (key < end) load_pooled<D>(a, sequence, keys, key, end, ring[key / kTileKeys % 2]);
    tile::cp_async_commit();
  };
  load(first);
  for (int key = first; key < end; key += kTileKeys) {
    tile::cp_async_wait<0>();
    __syncthreads();
    load(key + kTileKeys);
    body(key, ring[key / kTileKeys % 2]);
  }
  tile::cp_async_wait<0>();
  __syncthreads();
}

}  // namespace infllm::cuda::align
