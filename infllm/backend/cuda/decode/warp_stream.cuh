// SPDX-License-Identifier: Apache-2.0
//
// What one warp reads of a row, in the order in which it needs it: pieces of 32 rows of the cache.
//
//   normaliser windows | fine windows | forced blocks | chosen blocks
//
// A piece is 32 windows, which the lanes copy, or the keys and values of 16 tokens, which the copy
// engine does. The pieces of each kind are dealt out to all warps of all parts of the row. They go
// into a ring in shared memory, and the ring does not end where a kind does: while parts wait for
// each other's normaliser, fine windows arrive, and while blocks are chosen, forced ones. Only
// chosen blocks must be known before they can be asked for.
#pragma once

#include "infllm/backend/cuda/decode/kv_ring.cuh"
#include "infllm/backend/cuda/tile/tma.cuh"

namespace infllm::cuda::decode {

inline constexpr int kPieceRows = 2 * kSliceTokens;
inline constexpr int kWarpRingBytes = 24 * 1024;

// A warp's place among the `places` warps of its row.
struct WarpPlace {
  // How many of `total` things fall to it, dealt out in turn from either end of the warps.
  __device__ __forceinline__ int share(int total) const {
    return static_cast<int>(static_cast<unsigned>(total + places - 1 - place) /
                            static_cast<unsigned>(places));
  }
  __device__ __forceinline__ WarpPlace reversed() const { return {places - 1 - place, places}; }
  // The n-th of them.
  __device__ __forceinline__ int operator[](int n) const { return place + places * n; }

  int place, places;
};

// A piece in shared memory. Windows are rows as they are in a page. Tokens are panels of 64
// elements in the copy engine's 128-byte swizzle.
template <typename T, int kDim>
struct alignas(1024) Piece {
  static constexpr int kPieces = kDim / kPieceElements;  // of 16 bytes, of a row
  static constexpr int kPanel = kSliceTokens * 64;       // elements

  __device__ __forceinline__ const T* window(int i) const { return keys + i * kDim; }
  // Offset of a piece of a token.
  __device__ __forceinline__ static int at(int row, int piece) {
    return piece / 8 * kPanel + row * 64 + (piece % 8 ^ row % 8) * kPieceElements;
  }

  T keys[kSliceTokens * kDim];
  T values[kSliceTokens * kDim];
};

template <typename T, int kDim>
struct WarpStreamShared {
  static constexpr int kStages = kWarpRingBytes / static_cast<int>(sizeof(Piece<T, kDim>));
  std::uint64_t arrived[kStages];
  int exist[kStages];
};

template <typename T, int kDim>
class WarpStream {
 public:
  using Stage = Piece<T, kDim>;
  using Shared = WarpStreamShared<T, kDim>;
  static constexpr int kStages = Shared::kStages;

  // list: of the chosen blocks, in shared memory, once they are known. items: pieces of fine
  // windows that are wanted.
  __device__ __forceinline__ WarpStream(const PagePool& pool, const Sequence& sequence,
                                        const Forced& forced, int head_kv, WarpPlace place,
                                        PooledRows normaliser, PooledRows fine, int items,
                                        const CUtensorMap* planes, const std::int32_t* list,
                                        Stage* stages, Shared& shared)
      : pool_(pool),
        sequence_(sequence),
        forced_(forced),
        normaliser_(normaliser),
        fine_(fine),
        place_(place),
        lane_(static_cast<int>(threadIdx.x % 32)),
        head_kv_(head_kv),
        planes_(planes),
        list_(list),
        stages_(stages),
        shared_(shared) {
    const bool chooses = forced.free > 0;
    normaliser_end = chooses ? place.share((normaliser.end + kPieceRows - 1) / kPieceRows) : 0;
    fine_end = normaliser_end;
    if (chooses) fine_end += place.share(items);
    forced_end = fine_end + place.share(kBlockSlices * forced.count());
    // From the other end, so that nobody has one piece more twice.
    end = forced_end + place.reversed().share(kBlockSlices * forced.free);
    known_end_ = chooses ? forced_end : end;
  }

  // By one thread, with a barrier of the thread block before prepare(). In a loop, because what one
  // lane of a warp does is otherwise done for the warp, by an instruction that compute-sanitizer
  // takes for one of each lane.
  template <int kWarps>
  __device__ __forceinline__ static void set_up(Shared (&of_warps)[kWarps]) {
#pragma unroll 1
    for (Shared& one : of_warps) {
#pragma unroll
      for (std::uint64_t& arrived : one.arrived) tile::mbarrier_init(&arrived, 1);
    }
    tile::fence_mbarrier_init();
  }

  // What needs only the batch's arrays, by all lanes: the first pieces into L2; or, with `settled`,
  // into the ring, as long as nothing in them belongs to this step.
  __device__ __forceinline__ void prepare(bool settled) {
    look_up(0);
    if (settled) {
#pragma unroll 1
      while (fetched_ < min(known_end_, kStages) && is_old(fetched_)) fetch();
    }
#pragma unroll 1
    for (int n = fetched_; n < min(kStages, known_end_); ++n) {
      look_up(n);
      const int block = block_of(n);
      const int page = looked_up(block);
      if (page < 0) continue;
      if (n >= fine_end) {
        constexpr int kBytes = kSliceTokens * kDim * static_cast<int>(sizeof(T));
        const auto plane = lane_ == 0 ? pool_.map.key(head_kv_) : pool_.map.value(head_kv_);
        if (lane_ < 2) {
          prefetch(pool_.plane<const T>(page, plane) + first_token(n) * kDim, kBytes);
        }
      } else {
        const PooledRows rows = rows_of(n);
        if ((lane_ & ((1 << rows.page_shift) - 1)) == 0) {
          prefetch(pool_.plane<const std::byte>(page, rows.offset),
                   pool_.map.row_bytes << rows.page_shift);
        }
      }
    }
    look_up(fetched_);
  }

  // Asks for pieces until the ring is full, or it is not known which are next; `used` of them are
  // done with, by all lanes.
  __device__ __forceinline__ void fill(int used) {
#pragma unroll 1
    while (fetched_ < min(known_end_, used + kStages)) fetch();
  }
  // The list is there.
  __device__ __forceinline__ void chosen(int used) {
    known_end_ = end;
    look_up(fetched_);
    fill(used);
  }

  // Waits for the next piece. exist: of windows which ones, one bit each, of tokens how many.
  __device__ __forceinline__ const Stage& take(int& exist) {
    tile::mbarrier_wait(&shared_.arrived[stage_], phase_);
    Stage& stage = stages_[stage_];
    exist = shared_.exist[stage_];
    if (++stage_ == kStages) {
      stage_ = 0;
      phase_ ^= 1;
    }
    return stage;
  }

  // The number of a piece of fine windows among those of the row.
  __device__ __forceinline__ int fine_piece(int n) const { return place_[n - normaliser_end]; }

  // Where the kinds end; `end` is that of the chosen blocks.
  int normaliser_end, fine_end, forced_end, end;

 private:
  __device__ __forceinline__ PooledRows rows_of(int n) const {
    return n < normaliser_end ? normaliser_ : fine_;
  }
  __device__ __forceinline__ int slice_of(int n) const {
    return n < forced_end ? place_[n - fine_end] : place_.reversed()[n - forced_end];
  }
  __device__ __forceinline__ int first_token(int n) const {
    return slice_of(n) % kBlockSlices * kSliceTokens;
  }
  __device__ __forceinline__ int tokens_in(int block) const {
    return sequence_.length - block * kPageTokens;
  }
  // Of this lane's row of a piece of windows, or of the tokens of a slice; -1: none.
  __device__ __forceinline__ int block_of(int n) const {
    if (n < fine_end) {
      const PooledRows rows = rows_of(n);
      const int window = kPieceRows * place_[n < normaliser_end ? n : n - normaliser_end] + lane_;
      return window < rows.end ? window >> rows.page_shift : -1;
    }
    const int i = slice_of(n) / kBlockSlices;
    return n < forced_end ? forced_.block(i) : list_[i];
  }
  // Asks for the page, of whatever number: what the table says is looked at when it is needed.
  __device__ __forceinline__ void look_up(int n) {
    if (n < known_end_) entry_ = sequence_.table[max(0, min(block_of(n), sequence_.max_pages - 1))];
  }
  __device__ __forceinline__ int looked_up(int block) const {
    return block >= 0 && block < sequence_.max_pages && entry_ >= 0 && entry_ < pool_.num_pages
               ? entry_
               : -1;
  }
  // Whether nothing of a piece belongs to this step's token, the last one.
  __device__ __forceinline__ bool is_old(int n) const {
    if (n >= fine_end) {
      return block_of(n) * kPageTokens + first_token(n) + kSliceTokens < sequence_.length;
    }
    const int first = kPieceRows * place_[n < normaliser_end ? n : n - normaliser_end];
    return first + kPieceRows < rows_of(n).end;
  }

  __device__ __forceinline__ void fetch() {
    const int n = fetched_++;
    const int block = block_of(n);
    const int page = looked_up(block);
    look_up(n + 1);
    if (n < fine_end) {
      fetch_windows(rows_of(n), page);
    } else {
      const int first = first_token(n);
      const int tokens = page < 0 ? 0 : max(0, min(tokens_in(block) - first, kSliceTokens));
      fetch_slice(page, first, tokens);
    }
    if (++free_stage_ == kStages) free_stage_ = 0;
  }

  // Each lane has the page of a row. Lanes copy, 512 bytes at a time: the copy engine would want a
  // command for each page, with one row or four, and a warp gives those one after another.
  __device__ __forceinline__ void fetch_windows(const PooledRows& rows, int page) {
    constexpr int kRows = 32 / Stage::kPieces;  // at a time
    const unsigned exist = __ballot_sync(kAllLanes, page >= 0);
    const auto own =
        reinterpret_cast<std::uint64_t>(pool_.plane<const T>(max(page, 0), rows.offset) +
                                        (lane_ & ((1 << rows.page_shift) - 1)) * kDim);
    T* const to = stages_[free_stage_].keys + kPieceElements * lane_;
#pragma unroll
    for (int row = 0; row < kPieceRows; row += kRows) {
      const int mine = row + lane_ / Stage::kPieces;
      const T* const from = reinterpret_cast<const T*>(__shfl_sync(kAllLanes, own, mine));
      tile::cp_async_16(to + row * kDim, from + lane_ % Stage::kPieces * kPieceElements,
                        (exist >> mine & 1) != 0);
    }
    std::uint64_t* const arrived = &shared_.arrived[free_stage_];
    asm volatile(
        "cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(tile::shared_address(arrived))
        : "memory");
    if (lane_ == 0) shared_.exist[free_stage_] = static_cast<int>(exist);
    __syncwarp();  // all lanes' copies are counted before the phase can end
    if (lane_ == 0) tile::mbarrier_arrive(arrived);
  }

  // By the copy engine, which swizzles.
  __device__ __forceinline__ void fetch_slice(int page, int first, int tokens) {
    if (lane_ != 0) return;
    std::uint64_t* const arrived = &shared_.arrived[free_stage_];
    shared_.exist[free_stage_] = tokens;
    if (tokens == 0) {
      tile::mbarrier_arrive(arrived);
      return;
    }
    Stage& stage = stages_[free_stage_];
    tile::mbarrier_arrive_expect_tx(arrived, sizeof(Stage));
    tile::tma_load_5d(planes_, arrived, stage.keys, 0, first, 0, head_kv_, page);
    tile::tma_load_5d(planes_, arrived, stage.values, 0, first, 0, pool_.map.heads + head_kv_,
                      page);
  }

  const PagePool& pool_;
  const Sequence& sequence_;
  const Forced forced_;
  const PooledRows normaliser_, fine_;
  const WarpPlace place_;
  const int lane_;
  const int head_kv_;
  const CUtensorMap* const planes_;
  const std::int32_t* const list_;
  Stage* const stages_;
  Shared& shared_;
  int known_end_;  // of the pieces that can be asked for
  int fetched_ = 0;
  int entry_ = 0;       // of the page table, for the piece that is fetched next
  int free_stage_ = 0;  // that is filled next
  int stage_ = 0;       // that comes next
  std::uint32_t phase_ = 0;
};

}  // namespace infllm::cuda::decode
