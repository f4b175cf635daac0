// SPDX-License-Identifier: Apache-2.0
//
// Prefill attention on Hopper, dense causal and sparse (ops/attend.h). A thread block takes tiles
// (tiles.cuh) one after another. Its first warpgroup feeds shared memory: warp 0 streams the K and
// V blocks of the tile's list through a ring, warp 1 fetches the query rows. Each further warpgroup
// computes 64 rows = 64 / G tokens with all G heads of the KV head:
//
//   for each block that one of its tokens wants:  s = q k^T;  weights p of s;  o += p v
//
// Every warpgroup walks the whole list and passes blocks that none of its own tokens chose. With
// G = 16 a warp's 16 rows are one token, so whether it chose a block is a warp-uniform bit; smaller
// groups look at a bit for each row. Only a token's own block needs a mask inside.
#pragma once

#include "infllm/backend/cuda/sm90/attend_softmax.cuh"
#include "infllm/backend/cuda/sm90/tiles.cuh"
#include "infllm/backend/cuda/sm90/union.h"
#include "infllm/backend/cuda/tile/mma.cuh"
#include "infllm/backend/cuda/tile/tma.cuh"
#include "infllm/backend/cuda/tile/wgmma.cuh"

namespace infllm::cuda::sm90 {

inline constexpr std::size_t kSharedLimit = 227 * 1024;

// kGroup: query heads of a KV head if known when compiling, 0: any power of two up to 64.
template <typename T, int kHeadDim, int kComputeGroups, bool kIsSparse, int kGroupSize,
          typename Set, int kBlocksOfStep = 1, int kHeldQueries = 0, bool kDoOverlap = true>
struct AttendConfig {
  using Type = T;
  using TokenSet = Set;
  static constexpr int kDim = kHeadDim;
  static constexpr int kGroups = kComputeGroups;  // warpgroups that compute
  static constexpr bool kSparse = kIsSparse;
  static constexpr int kGroup = kGroupSize;
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kRows = kGroups * 64;
  static constexpr int kPanels = kDim / 64;
  static constexpr int kHeld = kHeldQueries;  // steps of 16 dimensions of q in registers
  static constexpr bool kOverlap = kDoOverlap;
  static constexpr int kBlocks = kBlocksOfStep;             // of a step, and of a stage of the ring
  static constexpr int kTileBytes = 64 * kDim * 2;          // of a K or V block, or 64 query rows
  static constexpr int kStageBytes = kBlocks * kTileBytes;  // of K or of V
  static constexpr int kFit =
      static_cast<int>((kSharedLimit - 2048 - kGroups * kTileBytes) / (2 * kStageBytes));
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  // 64 K registers among all warpgroups; the feeding one gives up most of its own.
  static constexpr int kFeedRegisters = kGroups == 2 ? 40 : kGroups == 3 ? 32 : 24;
  static constexpr int kComputeRegisters = kGroups == 2 ? 232 : kGroups == 3 ? 160 : 120;
};

struct AttendArgs {
  Batch batch;
  PagePool pool;
  UnionLists lists;
  void* o;
  float* lse;
  float c;  // scale log2(e)
  std::int32_t heads;
  std::int32_t group_log2;
  std::int32_t tile_tokens;
  std::int32_t first;  // tiles first .. first + count - 1; lists[0] is tile `first`
  std::int32_t count;
  unsigned* next;  // how many of them are taken
};

template <class C>
struct __align__(1024) AttendShared {
  struct Ring {
    std::uint64_t k_full[C::kStages], k_empty[C::kStages];
    std::uint64_t v_full[C::kStages], v_empty[C::kStages];
  };
  alignas(1024) std::byte q[C::kGroups][C::kTileBytes];
  alignas(1024) std::byte k[C::kStages][C::kStageBytes];
  alignas(1024) std::byte v[C::kStages][C::kStageBytes];
  Ring ring;
  std::uint64_t q_full, q_empty;
  std::uint64_t work_full[2], work_empty[2];
  struct Work {
    Tile tile;
    std::int32_t entries;
  } work[2];
};

// A place in the ring, and the parity that its "full" barriers will complete with.
template <int kStages>
struct RingCursor {
  int stage = 0;
  std::uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Warp 0 of the feeding warpgroup: takes tiles, tells everybody, loads their K and V blocks.
template <class C>
__device__ __forceinline__ void feed_blocks(AttendShared<C>& shared, const AttendArgs& a,
                                            const CUtensorMap& k_map, const CUtensorMap& v_map) {
  using namespace tile;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int tiles = count_tiles(a.batch, a.tile_tokens, C::kSparse);
  RingCursor<C::kStages> ring;
  for (unsigned n = 0;; ++n) {
    unsigned taken = 0;
    if (lane == 0) taken = atomicAdd(a.next, 1u);
    taken = __shfl_sync(0xffffffff, taken, 0);
    Tile tile;
    if (taken < static_cast<unsigned>(a.count)) {
      tile = find_tile(a.batch, a.tile_tokens, C::kSparse, tiles, a.heads,
                       a.first + static_cast<int>(taken));
    }
    int entries = 0;
    if (tile.index >= 0) {
      entries = C::kSparse ? a.lists.counts[tile.index - a.first] : tile.blocks(a.tile_tokens);
    }
    auto& work = shared.work[n % 2];
    mbarrier_wait(&shared.work_empty[n % 2], (n / 2 & 1) ^ 1);
    if (lane == 0) {
      work.tile = tile;
      work.entries = entries;
      mbarrier_arrive(&shared.work_full[n % 2]);
    }
    __syncwarp();
    if (tile.index < 0) return;
    const Sequence sequence(a.batch, tile.sequence);
    const std::int64_t list = std::int64_t{tile.index - a.first} * a.lists.capacity;
    for (int base = 0; base < entries; base += 32) {
      int page = -1;
      if (base + lane < entries) {
        const int block = C::kSparse ? a.lists.blocks[list + base + lane] : base + lane;
        page = sequence.page(block, a.pool.num_pages);
      }
      const int some = min(32, entries - base);
      for (int i = 0; i < some; i += C::kBlocks) {
        // A page that does not exist, and the other half of a last step, read as zeros.
        int from[C::kBlocks];
        for (int j = 0; j < C::kBlocks; ++j) {
          from[j] = __shfl_sync(0xffffffff, page, i + j);
          if (from[j] < 0) from[j] = a.pool.num_pages;
        }
        std::uint64_t* full = &shared.ring.k_full[ring.stage];
        std::byte* to = shared.k[ring.stage];
        mbarrier_wait(&shared.ring.k_empty[ring.stage], ring.phase ^ 1);
        if (lane == 0) {
          mbarrier_arrive_expect_tx(full, C::kStageBytes);
          if constexpr (C::kBlocks == 1) {
            tma_load_5d(&k_map, full, to, 0, 0, 0, tile.head, from[0]);
          } else {
            // Panel by panel, so that the keys of all blocks are rows of one operand.
            for (int panel = 0; panel < C::kPanels; ++panel) {
              for (int j = 0; j < C::kBlocks; ++j, to += 8192) {
                tma_load_5d(&k_map, full, to, 0, 0, panel, tile.head, from[j]);
              }
            }
          }
        }
        full = &shared.ring.v_full[ring.stage];
        to = shared.v[ring.stage];
        mbarrier_wait(&shared.ring.v_empty[ring.stage], ring.phase ^ 1);
        if (lane == 0) {
          mbarrier_arrive_expect_tx(full, C::kStageBytes);
          for (int j = 0; j < C::kBlocks; ++j, to += C::kTileBytes) {
            tma_load_5d(&v_map, full, to, 0, 0, 0, tile.head, from[j]);
          }
        }
        __syncwarp();
        ring.advance();
      }
    }
  }
}

// Warp 1: the query rows of each tile. Rows of other sequences' tokens may come along; nobody
// stores what becomes of them.
template <class C>
__device__ __forceinline__ void feed_queries(AttendShared<C>& shared, const AttendArgs& a,
                                             const CUtensorMap& q_map) {
  using namespace tile;
  const bool leader = threadIdx.x % 32 == 0;
  for (unsigned n = 0;; ++n) {
    mbarrier_wait(&shared.work_full[n % 2], n / 2 & 1);
    const Tile tile = shared.work[n % 2].tile;
    __syncwarp();
    if (leader) mbarrier_arrive(&shared.work_empty[n % 2]);
    if (tile.index < 0) return;
    mbarrier_wait(&shared.q_empty, (n & 1) ^ 1);
    if (leader) {
      mbarrier_arrive_expect_tx(&shared.q_full, C::kGroups * C::kTileBytes);
      for (int group = 0; group < C::kGroups; ++group) {
        tma_load_4d(&q_map, &shared.q_full, shared.q[group], 0, tile.head << a.group_log2,
                    tile.first_token + (group * 64 >> a.group_log2), 0, CacheHint::kEvictFirst);
      }
    }
    __syncwarp();
  }
}

// Where the rows of a lane of a computing warpgroup belong. Everything follows from the tile, which
// stays in shared memory, and is computed again where it is needed: registers are short.
template <class C>
struct Rows {
  __device__ __forceinline__ Rows(const Tile& of, const AttendArgs& a, int warpgroup)
      : tile(of),
        group_log2(C::kGroup == 0 ? a.group_log2 : __ffs(C::kGroup) - 1),
        group(warpgroup),
        first(warpgroup * 64 + static_cast<int>(threadIdx.x % 128 / 32) * 16) {}

  // The tile's token of the lane's row 0 or 1, and its query head.
  __device__ __forceinline__ int row(int i) const {
    return first + static_cast<int>(threadIdx.x % 32 / 4) + 8 * i;
  }
  __device__ __forceinline__ int token(int i) const { return row(i) >> group_log2; }
  __device__ __forceinline__ int head(int i) const {
    return (tile.head << group_log2) + (row(i) & ((1 << group_log2) - 1));
  }
  // The tile's token of the warp's and of the warpgroup's first row.
  __device__ __forceinline__ int warp_token() const { return first >> group_log2; }
  __device__ __forceinline__ int group_token() const { return group * 64 >> group_log2; }
  // The warpgroup's tokens as a set, and the block that all of them lie in.
  __device__ __forceinline__ std::uint64_t group_set() const {
    const int tokens = 64 >> group_log2;
    return (tokens == 64 ? ~0ull : (1ull << tokens) - 1) << group_token();
  }
  __device__ __forceinline__ int own_block() const {
    return (tile.position + group_token()) / kPageTokens;
  }
  // One of them is a token of the sequence.
  __device__ __forceinline__ bool in_use() const {
    const int token = tile.first_token + group_token();
    return token < tile.end && token + (64 >> group_log2) > tile.begin;
  }

  const Tile& tile;
  int group_log2;
  int group;
  int first;  // row of the warp
};

// Who wants the next 32 blocks of the list.
template <class C>
struct Wishes {
  // Entry `base` + i is described by bit i of each word.
  __device__ __forceinline__ void load(const AttendArgs& a, const Rows<C>& rows, int entries,
                                       int base) {
    constexpr unsigned kAll = 0xffffffff;
    const int entry = base + static_cast<int>(threadIdx.x % 32);
    const bool listed = entry < entries && rows.in_use();
    if constexpr (C::kSparse) {
      const std::int64_t at = std::int64_t{rows.tile.index - a.first} * a.lists.capacity + entry;
      typename C::TokenSet set = 0;
      int block = -1;
      if (listed) {
        set = static_cast<const typename C::TokenSet*>(a.lists.tokens)[at];
        block = a.lists.blocks[at];
      }
      group = __ballot_sync(kAll, (set & rows.group_set()) != 0);
      own = __ballot_sync(kAll, block == rows.own_block());
      if constexpr (C::kGroup == 16) {
        row[0] = __ballot_sync(kAll, set >> rows.warp_token() & 1);
        row[1] = row[0];
      } else {
        for (int i = 0; i < max(1, 16 >> rows.group_log2); ++i) {
          const int token = rows.warp_token() + i;
          const unsigned word = __ballot_sync(kAll, set >> token & 1);
          if (rows.token(0) == token) row[0] = word;
          if (rows.token(1) == token) row[1] = word;
        }
      }
    } else {
      const Sequence sequence(a.batch, rows.tile.sequence);
      group = __ballot_sync(
          kAll, listed && entry <= rows.own_block() && sequence.page(entry, a.pool.num_pages) >= 0);
      own = __ballot_sync(kAll, entry == rows.own_block());
      row[0] = row[1] = group;
    }
  }

  unsigned group;   // some token of this warpgroup
  unsigned row[2];  // the tokens of this lane's rows
  unsigned own;     // it is the tokens' own block
};

// The last page of a sequence holds rows that nobody wrote. They may be NaN, and 0 x NaN is NaN.
template <class C>
__device__ __forceinline__ void clear_tail(std::byte* v, int first_row, int group) {
  for (int panel = 0; panel < C::kPanels; ++panel) {
    auto* words = reinterpret_cast<uint4*>(v + panel * 8192);
    for (int i = first_row * 8 + static_cast<int>(threadIdx.x % 128); i < 64 * 8; i += 128) {
      words[i] = uint4{0, 0, 0, 0};
    }
  }
  tile::fence_async_proxy();
  tile::named_barrier_sync(1 + group, 128);
}

// Writes one row's share of this quad: lane q of it holds columns 8 i + 2 q, + 1 as words[i]. Four
// exchanges give it columns 32 j + 8 q .. + 7 instead, which is one store of 16 bytes.
template <class C>
__device__ __forceinline__ void store_row(typename C::Type* row,
                                          std::uint32_t (&words)[C::kDim / 8], bool valid) {
  const int quad = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int j = 0; j < C::kDim / 32; ++j) {
    std::uint32_t* w = words + 4 * j;
    // Transposes 4 x 4 words among the four lanes in two steps.
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const bool odd = quad & 1;
      const std::uint32_t give = odd ? w[i] : w[i + 1];
      const std::uint32_t got = __shfl_xor_sync(0xffffffff, give, 1);
      if (odd) {
        w[i] = got;
      } else {
        w[i + 1] = got;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool high = quad & 2;
      const std::uint32_t give = high ? w[i] : w[i + 2];
      const std::uint32_t got = __shfl_xor_sync(0xffffffff, give, 2);
      if (high) {
        w[i] = got;
      } else {
        w[i + 2] = got;
      }
    }
    if (valid) {
      *reinterpret_cast<uint4*>(row + 32 * j + 8 * quad) = uint4{w[0], w[1], w[2], w[3]};
    }
  }
}

template <class C>
__device__ __forceinline__ void store_tile(const AttendArgs& a, const Rows<C>& rows,
                                           const RowState (&state)[2],
                                           const float (&o)[C::kDim / 2]) {
  constexpr float kLn2 = 0.6931471805599453f;
  const Tile& tile = rows.tile;
  const int heads_q = a.heads << rows.group_log2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float l = quad_sum(state[i].l);
    const float inverse = l > 0 ? 1 / l : 0.0f;
    const int token = tile.first_token + rows.token(i);
    const bool valid = token >= tile.begin && token < tile.end;
    std::uint32_t words[C::kDim / 8];
#pragma unroll
    for (int j = 0; j < C::kDim / 8; ++j) {
      words[j] = infllm::cuda::tile::pack2<typename C::Type>(o[4 * j + 2 * i] * inverse,
                                                             o[4 * j + 2 * i + 1] * inverse);
    }
    const std::int64_t row = std::int64_t{token} * heads_q + rows.head(i);
    store_row<C>(static_cast<typename C::Type*>(a.o) + row * C::kDim, words, valid);
    if (a.lse != nullptr && valid && threadIdx.x % 4 == 0) {
      a.lse[std::int64_t{rows.head(i)} * a.batch.num_tokens + token] =
          l > 0 ? (state[i].m * a.c + log2f(l)) * kLn2 : -kInfinity;
    }
  }
}

// The query rows of a warp as operand a: read from shared memory by each product, or held in
// registers, which halves the shared memory traffic of a product of 64 columns.
template <class C>
struct Queries {
  static constexpr int kSteps = C::kDim / 16;

  __device__ __forceinline__ explicit Queries(const std::byte* rows)
      : desc(tile::smem_desc_k_major(rows)) {}

  // Returns true if shared memory is not needed any more.
  __device__ __forceinline__ bool hold(const std::byte* rows) {
    if constexpr (C::kHeld > 0) {
      const int lane = static_cast<int>(threadIdx.x % 32);
      const int row = static_cast<int>(threadIdx.x % 128 / 32) * 16 + lane % 16;
#pragma unroll
      for (int k = 0; k < C::kHeld; ++k) {
        const int unit = (k % 4 * 2 + lane / 16) ^ row % 8;  // swizzled
        tile::ldmatrix_x4(a[k], rows + k / 4 * 8192 + row * 128 + unit * 16);
      }
    }
    return C::kHeld == kSteps;
  }

  template <class Product, int kCount>
  __device__ __forceinline__ void multiply(float (&s)[kCount], std::uint64_t k_desc,
                                           int panel_bytes) const {
    tile::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const std::uint64_t at = k_desc + k / 4 * (panel_bytes / 16) + k % 4 * tile::kStepKMajor;
      if (k < C::kHeld) {
        Product::rs(s, a[k][0], a[k][1], a[k][2], a[k][3], at, k != 0);
      } else {
        Product::ss(s, desc + k / 4 * (8192 / 16) + k % 4 * tile::kStepKMajor, at, k != 0);
      }
    }
    tile::wgmma_commit();
  }

  std::uint64_t desc;
  std::uint32_t a[kSteps][4];
};

// The products of the next block are under way while this one's weights are made, as long as the
// warpgroup wants the next one too. Before it passes a block it finishes its own, because the ring
// cannot move on while V is held.
template <class C>
__device__ __forceinline__ void compute(AttendShared<C>& shared, const AttendArgs& a, int group) {
  using namespace tile;
  using T = typename C::Type;
  using Product = Wgmma<T, 64, Major::kK>;
  using Sum = Wgmma<T, C::kDim, Major::kMN>;
  const bool leader = threadIdx.x % 32 == 0;
  const int lane_column = static_cast<int>(threadIdx.x % 4) * 2;
  Queries<C> queries(shared.q[group]);
  RingCursor<C::kStages> ring;
  for (unsigned n = 0;; ++n) {
    mbarrier_wait(&shared.work_full[n % 2], n / 2 & 1);
    const auto& work = shared.work[n % 2];
    const Tile& tile = work.tile;
    const int entries = work.entries;
    if (tile.index < 0) return;
    const Rows<C> rows(tile, a, group);
    Wishes<C> wishes{};
    RowState state[2];
    float s[32];
    std::uint32_t p[16];
    float o[C::kDim / 2];
#pragma unroll
    for (int i = 0; i < C::kDim / 2; ++i) o[i] = 0;
    float factor[2];

    const auto multiply_keys = [&] {
      queries.template multiply<Product>(s, smem_desc_k_major(shared.k[ring.stage]), 8192);
    };
    const auto multiply_values = [&](int stage) {
      const std::uint64_t v_desc = smem_desc_mn_major(shared.v[stage]);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        Sum::rs(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                v_desc + step * kStepMnMajor, 1);
      }
      wgmma_commit();
    };
    bool any_wanted = false;  // by this warp
    const auto make_weights = [&](unsigned bit) {
      if (wishes.own & bit) {
        const int first = tile.position - rows.own_block() * kPageTokens;
        mask_beyond(s, {first + rows.token(0), first + rows.token(1)}, lane_column);
      }
      const bool wanted[2] = {(wishes.row[0] & bit) != 0, (wishes.row[1] & bit) != 0};
      any_wanted = __any_sync(0xffffffff, wanted[0] || wanted[1]);
      if (any_wanted) weigh(s, wanted, a.c, state, factor);
    };
    const auto keep_weights = [&] {
      if (any_wanted) {
        rescale(o, factor);
#pragma unroll
        for (int i = 0; i < 16; ++i) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
      } else {
#pragma unroll
        for (int i = 0; i < 16; ++i) p[i] = 0;
      }
    };
    bool own = false;  // the block whose weights are in p
    const auto prepare_values = [&](const RingCursor<C::kStages>& at) {
      mbarrier_wait(&shared.ring.v_full[at.stage], at.phase);
      if (!own) return;
      const int written = tile.length - rows.own_block() * kPageTokens;
      if (written < kPageTokens) clear_tail<C>(shared.v[at.stage], written, group);
    };

    mbarrier_wait(&shared.q_full, n & 1);
    const bool released = queries.hold(shared.q[group]);
    __syncwarp();
    if (released && leader) mbarrier_arrive(&shared.q_empty);
    bool pending = false;  // p holds weights of the block at `before`
    RingCursor<C::kStages> before;
    for (int entry = 0;; ++entry) {
      if (entry % 32 == 0 && entry < entries) wishes.load(a, rows, entries, entry);
      const unsigned bit = 1u << entry % 32;
      const bool wanted = entry < entries && (wishes.group & bit) != 0;
      if (C::kOverlap && pending && wanted) {
        mbarrier_wait(&shared.ring.k_full[ring.stage], ring.phase);
        multiply_keys();
        prepare_values(before);
        multiply_values(before.stage);
        wgmma_wait<1>();
        wgmma_pin(s);
        if (leader) mbarrier_arrive(&shared.ring.k_empty[ring.stage]);
        make_weights(bit);
        wgmma_wait<0>();
        wgmma_pin(o);
        if (leader) mbarrier_arrive(&shared.ring.v_empty[before.stage]);
        keep_weights();
      } else {
        if (pending) {
          prepare_values(before);
          multiply_values(before.stage);
          wgmma_wait<0>();
          wgmma_pin(o);
          if (leader) mbarrier_arrive(&shared.ring.v_empty[before.stage]);
        }
        if (entry >= entries) break;
        if (wanted) {
          mbarrier_wait(&shared.ring.k_full[ring.stage], ring.phase);
          multiply_keys();
          wgmma_wait<0>();
          wgmma_pin(s);
          if (leader) mbarrier_arrive(&shared.ring.k_empty[ring.stage]);
          make_weights(bit);
          keep_weights();
          if constexpr (!C::kOverlap) {
            own = (wishes.own & bit) != 0;
            prepare_values(ring);
            multiply_values(ring.stage);
            wgmma_wait<0>();
            wgmma_pin(o);
            if (leader) mbarrier_arrive(&shared.ring.v_empty[ring.stage]);
          }
        } else if (leader) {
          mbarrier_wait(&shared.ring.k_full[ring.stage], ring.phase);
          mbarrier_arrive(&shared.ring.k_empty[ring.stage]);
          mbarrier_wait(&shared.ring.v_full[ring.stage], ring.phase);
          mbarrier_arrive(&shared.ring.v_empty[ring.stage]);
        }
        __syncwarp();
      }
      pending = C::kOverlap && wanted;
      own = (wishes.own & bit) != 0;
      before = ring;
      ring.advance();
    }
    if (!released && leader) mbarrier_arrive(&shared.q_empty);
    store_tile<C>(a, rows, state, o);
    __syncwarp();
    if (leader) mbarrier_arrive(&shared.work_empty[n % 2]);
  }
}

// Dense attention in steps of two blocks. The products of the next step are under way while this
// one's weights are made, and the two warpgroups take turns at the tensor cores: one multiplies
// while the other computes exponentials.
template <class C>
__device__ __forceinline__ void compute_dense(AttendShared<C>& shared, const AttendArgs& a,
                                              int group) {
  using namespace tile;
  static_assert(C::kBlocks == 2 && C::kGroups == 2);
  using T = typename C::Type;
  using Product = Wgmma<T, 128, Major::kK>;
  using Sum = Wgmma<T, C::kDim, Major::kMN>;
  const bool leader = threadIdx.x % 32 == 0;
  const int lane_column = static_cast<int>(threadIdx.x % 4) * 2;
  Queries<C> queries(shared.q[group]);
  const auto wait_turn = [&] { named_barrier_sync(4 + group, 256); };
  const auto pass_turn = [&] { named_barrier_arrive(5 - group, 256); };
  if (group == 1) pass_turn();
  RingCursor<C::kStages> ring;
  for (unsigned n = 0;; ++n) {
    mbarrier_wait(&shared.work_full[n % 2], n / 2 & 1);
    const auto& work = shared.work[n % 2];
    const Tile& tile = work.tile;
    const int entries = work.entries;
    if (tile.index < 0) return;
    const Rows<C> rows(tile, a, group);
    const int steps = (entries + 1) / 2;
    RowState state[2];
    float s[64];
    std::uint32_t p[32];
    float o[C::kDim / 2];
#pragma unroll
    for (int i = 0; i < C::kDim / 2; ++i) o[i] = 0;
    float factor[2];
    constexpr bool kWanted[2] = {true, true};

    const auto multiply_keys = [&](int stage) {
      queries.template multiply<Product>(s, smem_desc_k_major(shared.k[stage]), 16384);
    };
    const auto multiply_values = [&](int stage) {
      const std::uint64_t v_desc = smem_desc_mn_major(shared.v[stage]);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 8; ++step) {
        Sum::rs(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                v_desc + step / 4 * (C::kTileBytes / 16) + step % 4 * kStepMnMajor, 1);
      }
      wgmma_commit();
    };
    const Sequence sequence(a.batch, tile.sequence);
    unsigned present = 0;  // bit i: block 32 n + i has a page, or lies behind the end
    const auto mask = [&](int step) {
      if (step % 16 == 0) {
        const int block = 2 * step + static_cast<int>(threadIdx.x % 32);
        present = __ballot_sync(0xffffffff,
                                block >= entries || sequence.page(block, a.pool.num_pages) >= 0);
      }
      if (step == steps - 1) {
        const int first = tile.position - step * 2 * kPageTokens;
        mask_beyond(s, {first + rows.token(0), first + rows.token(1)}, lane_column);
      }
      const unsigned both = present >> step % 16 * 2 & 3;
      if (both != 3) {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
          if ((both >> i / 32 & 1) == 0) s[i] = -kInfinity;
        }
      }
    };

    mbarrier_wait(&shared.q_full, n & 1);
    const bool released = queries.hold(shared.q[group]);
    __syncwarp();
    if (released && leader) mbarrier_arrive(&shared.q_empty);
    mbarrier_wait(&shared.ring.k_full[ring.stage], ring.phase);
    wait_turn();
    multiply_keys(ring.stage);
    pass_turn();
    wgmma_wait<0>();
    wgmma_pin(s);
    if (leader) mbarrier_arrive(&shared.ring.k_empty[ring.stage]);
    mask(0);
    weigh(s, kWanted, a.c, state, factor);
#pragma unroll
    for (int i = 0; i < 32; ++i) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
    auto before = ring;
    for (int step = 1; step < steps; ++step) {
      ring.advance();
      mbarrier_wait(&shared.ring.k_full[ring.stage], ring.phase);
      wait_turn();
      multiply_keys(ring.stage);
      mbarrier_wait(&shared.ring.v_full[before.stage], before.phase);
      multiply_values(before.stage);
      pass_turn();
      wgmma_wait<1>();
      wgmma_pin(s);
      if (leader) mbarrier_arrive(&shared.ring.k_empty[ring.stage]);
      mask(step);
      weigh(s, kWanted, a.c, state, factor);
      wgmma_wait<0>();
      wgmma_pin(o);
      if (leader) mbarrier_arrive(&shared.ring.v_empty[before.stage]);
      rescale(o, factor);
#pragma unroll
      for (int i = 0; i < 32; ++i) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
      before = ring;
    }
    if (!released && leader) mbarrier_arrive(&shared.q_empty);
    mbarrier_wait(&shared.ring.v_full[ring.stage], ring.phase);
    const int written = tile.length - (entries - 1) * kPageTokens;
    if (written < kPageTokens) {
      clear_tail<C>(shared.v[ring.stage] + (entries - 1) % 2 * C::kTileBytes, written, group);
    }
    multiply_values(ring.stage);
    wgmma_wait<0>();
    wgmma_pin(o);
    if (leader) mbarrier_arrive(&shared.ring.v_empty[ring.stage]);
    ring.advance();
    store_tile<C>(a, rows, state, o);
    __syncwarp();
    if (leader) mbarrier_arrive(&shared.work_empty[n % 2]);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    attend_kernel(const __grid_constant__ CUtensorMap q_map,
                  const __grid_constant__ CUtensorMap k_map,
                  const __grid_constant__ CUtensorMap v_map, const __grid_constant__ AttendArgs a) {
  using namespace tile;
  extern __shared__ std::byte memory[];
  auto& shared =
      *reinterpret_cast<AttendShared<C>*>(memory + (1024 - shared_address(memory) % 1024) % 1024);
  const int warp = warp_index();
  if (threadIdx.x == 0) {
    constexpr int kWarps = C::kGroups * 4;
    for (int i = 0; i < C::kStages; ++i) {
      mbarrier_init(&shared.ring.k_full[i], 1);
      mbarrier_init(&shared.ring.v_full[i], 1);
      mbarrier_init(&shared.ring.k_empty[i], kWarps);
      mbarrier_init(&shared.ring.v_empty[i], kWarps);
    }
    mbarrier_init(&shared.q_full, 1);
    mbarrier_init(&shared.q_empty, kWarps);
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&shared.work_full[i], 1);
      mbarrier_init(&shared.work_empty[i], kWarps + 1);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (warp < 4) {
    setmaxnreg_dec<C::kFeedRegisters>();
    if (warp == 0) feed_blocks<C>(shared, a, k_map, v_map);
    if (warp == 1) feed_queries<C>(shared, a, q_map);
  } else {
    setmaxnreg_inc<C::kComputeRegisters>();
    if constexpr (C::kBlocks == 2) {
      compute_dense<C>(shared, a, warp / 4 - 1);
    } else {
      compute<C>(shared, a, warp / 4 - 1);
    }
  }
}

}  // namespace infllm::cuda::sm90
