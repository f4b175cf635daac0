// SPDX-License-Identifier: Apache-2.0
//
// Scores of a tile of neighbouring tokens (token_tile.cuh) in two passes over pooled keys: the
// first finds each row's log-sum-exp over the normalising windows, the second adds the group's
// probabilities over the fine windows and takes each block's best one.
//
// Both multiply the other way round, S^T = K Q^T, 64 windows by 32 rows a warp: the rows, whose
// fragments stay in registers, are columns, so each lane has its columns' statistics to itself
// until the end of a pass, and sums over a group's heads are mostly sums within a lane
// (group_sum.cuh). For that, groups are padded to a power of two. Windows go through a ring of
// shared-memory tiles, filled by cp.async from arrays that gather_pooled() wrote.
//
// Only windows of blocks that selection may choose freely are scored in the second pass (those
// before the local window, spec section 5); the first needs every visible one.
#include <bit>

#include "infllm/backend/cuda/heads.h"
#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/pooled.h"
#include "infllm/backend/cuda/powers.cuh"
#include "infllm/backend/cuda/shapes.cuh"
#include "infllm/backend/cuda/sm80/group_sum.cuh"
#include "infllm/backend/cuda/sm80/score.h"
#include "infllm/backend/cuda/sm80/token_tile.cuh"
#include "infllm/backend/cuda/sm80/warp_products.cuh"

namespace infllm::cuda::sm80 {
namespace {

constexpr int kSlots = 3;             // tiles of windows in flight
constexpr int kMaxGroup = kWarpRows;  // a group's sum stays within a warp
constexpr int kTileBlocks = kPooledTile / kFineRows;

static_assert(kPooledTile == kSumWindows);

struct ScoreArgs {
  Batch batch;
  const void* q;
  float* scores;
  const std::byte* fine;
  const std::byte* coarse;  // null: the fine windows normalise
  std::int64_t fine_rows;
  std::int64_t coarse_rows;
  std::int64_t blocks;  // N
  int heads_kv;
  int group;
  int padded_group;
  float c;  // exponent_of(scale)
  int init_blocks;
  int local_blocks;
  int budget_blocks;
  bool round;  // scores to bf16
};

// Windows of one kind of one sequence and KV head.
struct Windows {
  const std::byte* data;
  bool coarse;

  // Those whose last token is at or before `position`.
  __device__ int visible(int position) const {
    return coarse ? coarse_windows(position + 1) : fine_windows(position + 1);
  }
};

template <typename T, int D>
class Scorer {
 public:
  using Smem = SmemTile<D>;
  static constexpr int kTileBytes = kPooledTile * Smem::kRowBytes;

  static constexpr int shared_bytes(int padded_group) {
    return kSlots * kTileBytes +
           kTileRows / padded_group * kSumStride * static_cast<int>(sizeof(float));
  }

  __device__ Scorer(const ScoreArgs& args, std::byte* shared, const TokenTile& tile)
      : a_(args),
        ring_(shared),
        tile_(tile),
        head_(static_cast<int>(blockIdx.y)),
        warp_(tile::warp_index()),
        lane_(static_cast<int>(threadIdx.x) % 32),
        warp_tokens_(kWarpRows / args.padded_group),
        first_token_(warp_ * warp_tokens_),
        sums_(reinterpret_cast<float*>(shared + kSlots * kTileBytes) + first_token_ * kSumStride) {
    if (lane_ < warp_tokens_) sums_[lane_ * kSumStride + kSumFirst - 1] = 0;
  }

  __device__ void run() {
    for (int t = 0; t < warp_tokens_ && first_token_ + t < tile_.tokens; ++t) start_row(t);
    const int last = tile_.first + tile_.tokens - 1;
    if (selects_all(last)) return;  // and so do those before it
    load_queries();
    const std::int64_t plane = std::int64_t{tile_.sequence} * a_.heads_kv + head_;
    const Windows fine{a_.fine + plane * a_.fine_rows * Smem::kRowBytes, false};
    const Windows norm = a_.coarse == nullptr
                             ? fine
                             : Windows{a_.coarse + plane * a_.coarse_rows * Smem::kRowBytes, true};
    normalise(norm, norm.visible(last));
    score(fine, first_local(last) * kFineRows);
  }

 private:
  static __device__ int block_of(int position) {
    return static_cast<int>(static_cast<unsigned>(position) / kPageTokens);
  }
  // The first block that the local window forces.
  __device__ int first_local(int position) const {
    return max(0, block_of(position) - a_.local_blocks + 1);
  }
  __device__ bool selects_all(int position) const {
    return block_of(position) + 1 <= a_.budget_blocks;
  }
  __device__ float* score_row(int token) const {
    return a_.scores +
           (std::int64_t{head_} * a_.batch.num_tokens + tile_.token + token) * a_.blocks;
  }

  // +inf in forced blocks (or in all causal ones), -inf after the own one; free blocks come later.
  __device__ void start_row(int warp_token) const {
    const int token = first_token_ + warp_token;
    const int position = tile_.first + token;
    const int own = block_of(position);
    const int local = selects_all(position) ? 0 : first_local(position);
    float* row = score_row(token);
    for (int b = lane_; b < a_.blocks; b += 32) {
      if (b < a_.init_blocks || b >= local) row[b] = b <= own ? INFINITY : -INFINITY;
    }
  }

  // The query that is column `column` of the warp; its token, or -1 for padding.
  __device__ int token_of(int column) const {
    const int token = first_token_ + column / a_.padded_group;
    return column % a_.padded_group < a_.group && token < tile_.tokens ? token : -1;
  }

  __device__ void load_queries() {
    const auto* q = static_cast<const T*>(a_.q);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int column = 8 * n + (lane_ >> 2);
      const int token = token_of(column);
      const std::int64_t row =
          (std::int64_t{tile_.token + token} * a_.heads_kv + head_) * a_.group +
          column % a_.padded_group;
      const T* from = q + row * D + (lane_ & 3) * 2;
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          q_[n][k][half] =
              token < 0 ? 0 : *reinterpret_cast<const std::uint32_t*>(from + k * 16 + half * 8);
        }
      }
    }
  }

  // Starts the copy of a tile of windows, one group in any case. The arrays are zero up to a
  // multiple of 64 windows.
  __device__ void load_tile(const Windows& windows, int tile, int tiles) const {
    if (tile < tiles) {
      Smem::template load<kPooledTile, kTileThreads>(ring_ + tile % kSlots * kTileBytes,
                                                     windows.data + std::int64_t{tile} * kTileBytes,
                                                     kPooledTile);
    }
    tile::cp_async_commit();
  }

  // Calls body(first window, S^T) for the tiles that hold windows 0 .. count - 1. All warps walk
  // along; body runs in those with tokens to score.
  template <typename Body>
  __device__ void for_each_tile(const Windows& windows, int count, const Body& body) const {
    const int tiles = (count + kPooledTile - 1) / kPooledTile;
    const bool active = first_token_ < tile_.tokens;
#pragma unroll
    for (int i = 0; i < kSlots - 1; ++i) load_tile(windows, i, tiles);
    for (int i = 0; i < tiles; ++i) {
      tile::cp_async_wait<kSlots - 2>();
      __syncthreads();  // the tile is there, and everybody is done with the one before
      load_tile(windows, i + kSlots - 1, tiles);
      if (!active) continue;
      float s[4][4][4];
      multiply(s, ring_ + i % kSlots * kTileBytes);
      body(i * kPooledTile, s);
    }
    tile::cp_async_wait<0>();
    __syncthreads();  // the ring is free
  }

  __device__ __forceinline__ void multiply(float (&s)[4][4][4], const std::byte* keys) const {
    clear(s);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        std::uint32_t a[4];
        Smem::a_fragment(a, keys, 16 * m, k, lane_);
#pragma unroll
        for (int n = 0; n < 4; ++n) tile::mma_m16n8k16<T>(s[m][n], a, q_[n][k]);
      }
    }
  }

  // Windows of a tile that the query in column 8 n + 2 (lane % 4) + i sees.
  __device__ int visible_in(const Windows& windows, int first, int n, int i) const {
    const int token = token_of(8 * n + (lane_ & 3) * 2 + i);
    return token < 0 ? 0 : windows.visible(tile_.first + token) - first;
  }

  // Pass 1: log-sum-exp of each of the lane's eight columns, base 2, into lse_; +inf, which makes
  // all probabilities zero, for columns that see nothing or are padding.
  __device__ void normalise(const Windows& windows, int count) {
    float sum[4][2];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        lse_[n][i] = kNoMaximum;
        sum[n][i] = 0;
      }
    }
    const int seen_by_all = windows.visible(tile_.first + min(first_token_, tile_.tokens - 1));
    for_each_tile(windows, count, [&](int first, float(&s)[4][4][4]) {
      const bool cut = first + kPooledTile > seen_by_all;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (cut) {
            const int seen = visible_in(windows, first, n, i);
#pragma unroll
            for (int w = 0; w < 8; ++w) {
              if (w * 8 + (lane_ >> 2) >= seen) s[w / 2][n][w % 2 * 2 + i] = -INFINITY;
            }
          }
          float top = s[0][n][i];
#pragma unroll
          for (int w = 1; w < 8; ++w) top = fmaxf(top, s[w / 2][n][w % 2 * 2 + i]);
          const float m = fmaxf(lse_[n][i], top * a_.c);
          float l = sum[n][i] * tile::fast_exp2(lse_[n][i] - m);
#pragma unroll
          for (int w = 0; w < 8; ++w) {
            l += tile::fast_exp2(fmaf(s[w / 2][n][w % 2 * 2 + i], a_.c, -m));
          }
          lse_[n][i] = m;
          sum[n][i] = l;
        }
      }
    });
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float m = lse_[n][i];
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, lanes));
        }
        float l = sum[n][i] * tile::fast_exp2(lse_[n][i] - m);
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) l += __shfl_xor_sync(0xffffffff, l, lanes);
        const bool query = token_of(8 * n + (lane_ & 3) * 2 + i) >= 0;
        lse_[n][i] = query && l > 0 ? m + log2f(l) : INFINITY;
      }
    }
  }

  // Pass 2, over windows 0 .. count - 1.
  __device__ void score(const Windows& windows, int count) {
    const int seen_by_all = windows.visible(tile_.first + min(first_token_, tile_.tokens - 1));
    for_each_tile(windows, count, [&](int first, float(&s)[4][4][4]) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int w = 0; w < 8; ++w) {
            float& x = s[w / 2][n][w % 2 * 2 + i];
            x = tile::fast_exp2(fmaf(x, a_.c, -lse_[n][i]));
          }
        }
      }
      if (first + kPooledTile > seen_by_all) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int seen = visible_in(windows, first, n, i);
#pragma unroll
            for (int w = 0; w < 8; ++w) {
              if (w * 8 + (lane_ >> 2) >= seen) s[w / 2][n][w % 2 * 2 + i] = 0;
            }
          }
        }
      }
      sum_groups(a_.padded_group, s, sums_, lane_);
      __syncwarp();
      pool(first / kFineRows);
      __syncwarp();
      if (lane_ < warp_tokens_) {
        float* row = sums_ + lane_ * kSumStride;
        row[kSumFirst - 1] = row[kSumStride - 1];
      }
    });
  }

  // Writes the best windows of blocks first .. first + 15: the last one of the block before, which
  // reaches into the block, and the block's own four. A window that is not visible counts 0, which
  // every visible one can only raise, and a free block has some.
  __device__ void pool(int first) const {
    static_assert(kTileBlocks == 16);  // half a warp a token
    const int block = first + (lane_ & 15);
    if (block < a_.init_blocks) return;
    for (int t = lane_ >> 4; t < warp_tokens_; t += 2) {
      const int position = tile_.first + first_token_ + t;
      if (first_token_ + t >= tile_.tokens) return;
      if (selects_all(position) || block >= first_local(position)) continue;
      const float* sums = sums_ + t * kSumStride + kSumFirst + (lane_ & 15) * kFineRows;
      const float4 own = *reinterpret_cast<const float4*>(sums);
      const float best = fmaxf(fmaxf(fmaxf(own.x, own.y), fmaxf(own.z, own.w)), sums[-1]);
      score_row(first_token_ + t)[block] =
          a_.round ? __bfloat162float(__float2bfloat16_rn(best)) : best;
    }
  }

  const ScoreArgs& a_;
  std::byte* ring_;
  const TokenTile tile_;
  const int head_;
  const int warp_;
  const int lane_;
  const int warp_tokens_;
  const int first_token_;  // of the warp, within the tile
  float* sums_;            // [warp_tokens_][kSumStride]
  std::uint32_t q_[4][D / 16][2];
  float lse_[4][2];
};

// Block (x, y): KV head y, a tile of tokens, the late and long ones first.
template <typename T, int D>
__global__ void __launch_bounds__(kTileThreads, 3)
    score_kernel(const __grid_constant__ ScoreArgs args) {
  extern __shared__ __align__(1024) std::byte memory[];
  const int slot = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const TokenTile tile = token_tile(args.batch, kTileRows / args.padded_group, slot);
  if (tile.tokens == 0 || args.batch.sparse[tile.sequence] == 0) return;
  Scorer<T, D>(args, memory, tile).run();
}

template <typename T, int D>
Status launch(const Device& device, const ScoreArgs& args) {
  const std::int64_t slots = tile_slots(args.batch, kTileRows / args.padded_group);
  const dim3 grid(static_cast<unsigned>(slots), static_cast<unsigned>(args.heads_kv));
  return start("score", score_kernel<T, D>, grid, kTileThreads,
               Scorer<T, D>::shared_bytes(args.padded_group), device.stream, args);
}

}  // namespace

Status score(const Backend& backend, const ScoreParams& params, std::span<std::byte> workspace) {
  const KvLayout& layout = params.pages.layout;
  INFLLM_TRY(check_heads("score", layout, params.heads_q, kMaxGroup));
  const Device& device = device_of(backend);
  Arena arena(workspace);
  const PooledSizes sizes(params);
  const PooledKeys keys = carve(sizes, arena);
  INFLLM_TRY(gather_pooled(backend, params, keys));
  const int group = params.heads_q / layout.kv_heads;
  const ScoreArgs args{
      .batch = params.batch,
      .q = params.q,
      .scores = static_cast<float*>(params.scores),
      .fine = keys.fine,
      .coarse = params.config.lse_source == LseSource::kFine ? nullptr : keys.coarse,
      .fine_rows = sizes.fine_rows,
      .coarse_rows = sizes.coarse_rows,
      .blocks = params.config.blocks_in(params.batch.max_kv_length),
      .heads_kv = layout.kv_heads,
      .group = group,
      .padded_group = static_cast<int>(std::bit_ceil(static_cast<unsigned>(group))),
      .c = exponent_of(params.scale),
      .init_blocks = params.config.init_blocks,
      .local_blocks = params.config.local_blocks(),
      .budget_blocks = params.config.budget_blocks(),
      .round = params.config.score_rounding == ScoreRounding::kBF16};
  return with_shape(layout, [&]<typename T, int D>() { return launch<T, D>(device, args); });
}

std::size_t score_bytes(const Backend&, const ScoreParams& params) {
  return PooledSizes(params).bytes();
}

}  // namespace infllm::cuda::sm80
