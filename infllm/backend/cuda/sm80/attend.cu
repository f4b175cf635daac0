// SPDX-License-Identifier: Apache-2.0
//
// Attention of a tile of neighbouring tokens (token_tile.cuh), 32 rows a warp. The tile walks its
// blocks once: all causal ones if its sequence is dense, otherwise the union of its
// tokens' selections (union_lists.h). For each block
//
//   S = Q K^T   ->   P = 2^(c S - m), running maximum m and sum l   ->   O += P V
//
// K and V tiles go through a ring of slots, K0 V0 K1 V1 .., filled ahead by cp.async; one barrier a
// tile frees the slot of the tile before. A warp leaves out blocks that none of its tokens chose;
// where only some did, their rows are masked, and masked weights are exact zeros: a row's result
// does not depend on who shares its tile. Single elements are masked in the tokens' own blocks
// alone.
//
// 32 rows a warp: with 16, reading K and V from shared memory takes longer than the products
// (docs/kernels/cuda-sm80.md). O (128 registers a thread for D = 128) and S (64) leave no room for
// Q, which is read again for every block.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string>

#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/sm80/attend.h"
#include "infllm/backend/cuda/sm80/token_tile.cuh"
#include "infllm/backend/cuda/sm80/union_lists.h"
#include "infllm/backend/cuda/sm80/warp_products.cuh"
#include "infllm/backend/cuda/tile/control.cuh"

namespace infllm::cuda::sm80 {
namespace {

constexpr int kSteps = 32;            // steps that are looked up together
constexpr float kNoMaximum = -1e30f;  // instead of -inf, so that no difference is undefined
constexpr float kLn2 = 0.6931471805599453f;
constexpr double kLog2E = 1.4426950408889634;

struct AttendArgs {
  PagePool pool;
  Batch batch;
  const void* q;
  void* o;
  float* lse;
  UnionLists lists;  // without entries: all sequences are dense
  int heads_q;
  int group;
  int tile_tokens;
  float c;  // scale log2(e)
};

// A block to visit.
struct Step {
  std::int32_t block;
  std::int32_t page;
  std::uint32_t tokens;  // who wants it; 0 if it has no page
};

// Thread blocks in two sizes.
//   Dense: 128 rows and a ring of three slots; every warp needs every block.
//   Sparse: warps of a thread block wait for each other at every block that one of them needs, so
//   fewer tokens together waste less: 64 rows, and a ring of two slots, so that four thread blocks
//   fit. (64 rows and three slots: 19% slower. 128 rows: slower still.)
struct DenseShape {
  static constexpr int kWarps = 4;
  static constexpr int kSlots = 3;
};
struct SparseShape {
  static constexpr int kWarps = 2;
  static constexpr int kSlots = 2;
};
template <class Shape>
inline constexpr int kRowsOf = Shape::kWarps* kWarpRows;
// Warps that their registers, up to 255 or 168 a thread, let onto a multiprocessor.
template <int D>
inline constexpr int kResidentWarps = D == 128 ? 8 : 12;

template <class Shape, int D>
struct Shared {
  std::byte q[kRowsOf<Shape> * 2 * D];
  std::byte ring[Shape::kSlots][kPageTokens * 2 * D];
  Step steps[2][kSteps];  // those being visited and the next ones
};

template <typename T, int D, class Shape>
class Attender {
 public:
  using Smem = SmemTile<D>;
  static constexpr int kSlots = Shape::kSlots;
  static constexpr int kThreads = kRowsOf<Shape>;

  __device__ Attender(const AttendArgs& args, Shared<Shape, D>& shared, const TokenTile& tile,
                      int slot)
      : a_(args),
        shared_(shared),
        tile_(tile),
        sequence_(args.batch, tile.sequence),
        head_(static_cast<int>(blockIdx.y)),
        warp_(tile::warp_index()),
        lane_(static_cast<int>(threadIdx.x) % 32),
        sparse_(args.lists.entries != nullptr && sequence_.sparse) {
    const std::int64_t list = head_ * a_.lists.slots + slot;
    list_ = a_.lists.entries + list * a_.lists.capacity;
    count_ = sparse_ ? a_.lists.counts[list] : (tile.first + tile.tokens - 1) / kPageTokens + 1;
    const int rows = tile.tokens * a_.group;
    const int first_row = warp_ * kWarpRows;
    const int last_row = min(first_row + kWarpRows, rows) - 1;
    first_token_ = first_row / a_.group;
    last_token_ = last_row < first_row ? -1 : last_row / a_.group;
    // Dense steps carry all bits, so any bits will do.
    warp_tokens_ = last_token_ < 0 ? 0
                   : sparse_       ? (~0u >> (31 - last_token_)) & (~0u << first_token_)
                                   : 1;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      token_[i] =
          min((first_row + i / 2 * 16 + i % 2 * 8 + (lane_ >> 2)) / a_.group, tile.tokens - 1);
      m_[i] = kNoMaximum;
      l_[i] = 0;
    }
#pragma unroll
    for (int mi = 0; mi < 2; ++mi) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o_[mi][n][e] = 0;
      }
    }
  }

  __device__ void run() {
    look_up_steps(0);
    load_queries();
    __syncthreads();  // the steps
#pragma unroll
    for (int i = 0; i < kSlots - 1; ++i) load_tile(i);
    for (int j = 0; j < count_; ++j) {
      const bool wanted = next_tile(2 * j);
      if (j % kSteps == 0) look_up_steps(j / kSteps + 1);
      float s[2][8][4];
      if (wanted) {
        multiply_transposed<T, D>(s, shared_.q, warp_ * kWarpRows, slot(2 * j), 0, lane_);
        mask(s, step(j));
        soften(s);
      }
      next_tile(2 * j + 1);
      if (wanted) multiply_add<T, D>(o_, s, slot(2 * j + 1), 0, lane_);
    }
    tile::cp_async_wait<0>();
    __syncthreads();  // the queries have arrived even if there was no step
    finish();
  }

 private:
  __device__ const Step& step(int j) const { return shared_.steps[j / kSteps % 2][j % kSteps]; }
  __device__ std::byte* slot(int tile) const { return shared_.ring[tile % kSlots]; }

  // Warp 0 looks up the blocks and pages of steps chunk * kSteps ..
  __device__ void look_up_steps(int chunk) {
    const int j = chunk * kSteps + lane_;
    if (warp_ != 0 || j >= count_) return;
    const UnionEntry entry = sparse_ ? list_[j] : UnionEntry{j, ~0u};
    const int page = sequence_.page(entry.block, a_.pool.num_pages);
    shared_.steps[chunk % 2][lane_] = {entry.block, page, page < 0 ? 0 : entry.tokens};
  }

  // The row's place in [T, Hq, D], in elements.
  __device__ std::int64_t row_offset(int row) const {
    const int token = row / a_.group;
    const std::int64_t head = head_ * a_.group + row - token * a_.group;
    return (std::int64_t{tile_.token + token} * a_.heads_q + head) * D;
  }

  __device__ void load_queries() {
    const T* q = static_cast<const T*>(a_.q);
    const int rows = tile_.tokens * a_.group;
    for (int i = static_cast<int>(threadIdx.x); i < kThreads * Smem::kPieces; i += kThreads) {
      const int row = i / Smem::kPieces;
      const int piece = i % Smem::kPieces;
      tile::cp_async_16(shared_.q + Smem::offset(row, piece),
                        q + row_offset(min(row, rows - 1)) + piece * 8, row < rows);
    }
  }

  // Starts the copy of tile 2 j (keys of step j) or 2 j + 1 (its values), one group in any case.
  // Rows behind the sequence's end are zeros: whatever is there must not meet a weight of zero.
  __device__ void load_tile(int tile) {
    if (tile / 2 < count_) {
      const Step& at = step(tile / 2);
      const std::int64_t plane = tile % 2 == 0 ? a_.pool.map.key(head_) : a_.pool.map.value(head_);
      const auto* from = a_.pool.plane<const std::byte>(max(at.page, 0), plane);
      const int rows = at.page < 0 ? 0 : sequence_.length - at.block * kPageTokens;
      Smem::template load<kPageTokens, kThreads>(slot(tile), from, rows);
    }
    tile::cp_async_commit();
  }

  // Waits for a tile, frees the slot of the one before it and refills it. Returns whether this warp
  // has use for the tile's block.
  __device__ bool next_tile(int tile) {
    tile::cp_async_wait<kSlots - 2>();
    __syncthreads();
    load_tile(tile + kSlots - 1);
    const Step& at = step(tile / 2);
    return (at.tokens & warp_tokens_) != 0 && at.block * kPageTokens <= tile_.first + last_token_;
  }

  // -inf for the rows of tokens that did not choose the block and for keys behind the token.
  __device__ void mask(float (&s)[2][8][4], const Step& at) const {
    const int first_key = at.block * kPageTokens;
    const bool own = first_key + kPageTokens - 1 > tile_.first + first_token_;
    if (!own && (at.tokens & warp_tokens_) == warp_tokens_) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool chosen = !sparse_ || (at.tokens >> token_[i] & 1) != 0;
      const int keys = chosen ? tile_.first + token_[i] + 1 - first_key : 0;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int key = n * 8 + (lane_ & 3) * 2;
        if (key >= keys) s[i / 2][n][i % 2 * 2] = -INFINITY;
        if (key + 1 >= keys) s[i / 2][n][i % 2 * 2 + 1] = -INFINITY;
      }
    }
  }

  // Raises the maxima, rescales O and l if any of the warp's maxima rose, and turns S into weights.
  __device__ void soften(float (&s)[2][8][4]) {
    float factor[4];
    bool rose = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float top = s[i / 2][0][i % 2 * 2];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        top = fmaxf(top, fmaxf(s[i / 2][n][i % 2 * 2], s[i / 2][n][i % 2 * 2 + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
      const float m = fmaxf(m_[i], top * a_.c);
      factor[i] = tile::fast_exp2(m_[i] - m);
      rose |= m > m_[i];
      m_[i] = m;
    }
    if (__any_sync(0xffffffff, rose)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        l_[i] *= factor[i];
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          o_[i / 2][n][i % 2 * 2] *= factor[i];
          o_[i / 2][n][i % 2 * 2 + 1] *= factor[i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        float& low = s[i / 2][n][i % 2 * 2];
        float& high = s[i / 2][n][i % 2 * 2 + 1];
        low = tile::fast_exp2(fmaf(low, a_.c, -m_[i]));
        high = tile::fast_exp2(fmaf(high, a_.c, -m_[i]));
        l_[i] += low + high;
      }
    }
  }

  // Divides by the sums and writes O, through the warp's own rows of the query tile, and LSE.
  __device__ void finish() {
    const int first_row = warp_ * kWarpRows;
    const int rows = min(kWarpRows, tile_.tokens * a_.group - first_row);
    if (rows <= 0) return;
    std::byte* stage = shared_.q + first_row * Smem::kRowBytes;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float l = l_[i];
      l += __shfl_xor_sync(0xffffffff, l, 1);
      l += __shfl_xor_sync(0xffffffff, l, 2);
      const float inverse = l > 0 ? 1 / l : 0;
      const int row = i / 2 * 16 + i % 2 * 8 + (lane_ >> 2);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<std::uint32_t*>(stage + Smem::offset(row, n) + (lane_ & 3) * 4) =
            tile::pack2<T>(o_[i / 2][n][i % 2 * 2] * inverse,
                           o_[i / 2][n][i % 2 * 2 + 1] * inverse);
      }
      if (a_.lse != nullptr && (lane_ & 3) == 0 && row < rows) {
        const int token = (first_row + row) / a_.group;
        const std::int64_t head = head_ * a_.group + first_row + row - token * a_.group;
        a_.lse[head * a_.batch.num_tokens + tile_.token + token] =
            l > 0 ? m_[i] * kLn2 + logf(l) : -INFINITY;
      }
    }
    __syncwarp();
    T* o = static_cast<T*>(a_.o);
    for (int i = lane_; i < rows * Smem::kPieces; i += 32) {
      const int row = i / Smem::kPieces;
      const int piece = i % Smem::kPieces;
      *reinterpret_cast<uint4*>(o + row_offset(first_row + row) + piece * 8) =
          *reinterpret_cast<const uint4*>(stage + Smem::offset(row, piece));
    }
  }

  const AttendArgs& a_;
  Shared<Shape, D>& shared_;
  const TokenTile tile_;
  const Sequence sequence_;
  const int head_;
  const int warp_;
  const int lane_;
  const bool sparse_;
  const UnionEntry* list_;
  int count_;                  // steps
  int first_token_;            // of the warp's rows, within the tile
  int last_token_;             // -1: the warp has no rows
  std::uint32_t warp_tokens_;  // as bits
  int token_[4];               // of this lane's rows: lane / 4 + 0, 8, 16, 24
  float m_[4];
  float l_[4];
  float o_[2][D / 8][4];
};

// Block (x, y): KV head y, a tile of tokens, the late and long ones first.
template <typename T, int D, class Shape>
__global__ void __launch_bounds__(kRowsOf<Shape>, kResidentWarps<D> / Shape::kWarps)
    attend_kernel(const __grid_constant__ AttendArgs args) {
  extern __shared__ __align__(1024) std::byte memory[];
  const int slot = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const TokenTile tile = token_tile(args.batch, args.tile_tokens, slot);
  if (tile.tokens == 0) return;
  auto& shared = *reinterpret_cast<Shared<Shape, D>*>(memory);
  Attender<T, D, Shape>(args, shared, tile, slot).run();
}

// Sparse shapes need room for two tokens.
bool is_sparse_shape(const AttendParams& params) {
  return params.selection != nullptr && params.batch.any_sparse &&
         2 * (params.heads_q / params.pages.layout.kv_heads) <= kRowsOf<SparseShape>;
}

int tile_tokens(const AttendParams& params) {
  const int rows = is_sparse_shape(params) ? kRowsOf<SparseShape> : kRowsOf<DenseShape>;
  const int fit = rows / (params.heads_q / params.pages.layout.kv_heads);
  return params.selection == nullptr ? fit : std::min(fit, kUnionTokens);
}

template <typename T, int D, class Shape>
Status launch(const Device& device, const AttendArgs& args) {
  constexpr auto kernel = attend_kernel<T, D, Shape>;
  constexpr int kBytes = sizeof(Shared<Shape, D>);
  INFLLM_TRY(to_status(
      "attend", cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes)));
  const dim3 grid(static_cast<unsigned>(tile_slots(args.batch, args.tile_tokens)),
                  static_cast<unsigned>(args.pool.map.heads));
  kernel<<<grid, kRowsOf<Shape>, kBytes, device.stream>>>(args);
  return launched("attend");
}

template <typename T>
Status launch(const Device& device, const AttendArgs& args, int head_dim, bool sparse) {
  if (head_dim == 128) {
    return sparse ? launch<T, 128, SparseShape>(device, args)
                  : launch<T, 128, DenseShape>(device, args);
  }
  return sparse ? launch<T, 64, SparseShape>(device, args)
                : launch<T, 64, DenseShape>(device, args);
}

}  // namespace

bool attends(const AttendParams& params) {
  const KvLayout& layout = params.pages.layout;
  return (layout.dtype == DType::kBF16 || layout.dtype == DType::kF16) &&
         (layout.head_dim == 64 || layout.head_dim == 128) &&
         params.heads_q / layout.kv_heads <= kRowsOf<DenseShape>;
}

Status attend(const Backend& backend, const AttendParams& params, std::span<std::byte> workspace) {
  const KvLayout& layout = params.pages.layout;
  if (!attends(params)) {
    return unsupported("attend: " + std::to_string(params.heads_q / layout.kv_heads) +
                       " query heads of dimension " + std::to_string(layout.head_dim) +
                       " share a KV head, but this device takes up to " +
                       std::to_string(kRowsOf<DenseShape>) + " of dimension 64 or 128");
  }
  const Device& device = device_of(backend);
  const int tokens = tile_tokens(params);
  AttendArgs args{.pool = PagePool(params.pages),
                  .batch = params.batch,
                  .q = params.q,
                  .o = params.o,
                  .lse = static_cast<float*>(params.lse),
                  .heads_q = params.heads_q,
                  .group = params.heads_q / layout.kv_heads,
                  .tile_tokens = tokens,
                  .c = static_cast<float>(params.scale * kLog2E)};
  if (params.selection != nullptr && params.batch.any_sparse) {
    Arena arena(workspace);
    args.lists = INFLLM_TRY(build_union_lists(backend, params, tokens, arena));
  }
  const bool sparse = is_sparse_shape(params);
  return layout.dtype == DType::kF16 ? launch<__half>(device, args, layout.head_dim, sparse)
                                     : launch<__nv_bfloat16>(device, args, layout.head_dim, sparse);
}

std::size_t attend_bytes(const Backend&, const AttendParams& params) {
  if (params.selection == nullptr) return 0;
  return union_bytes(params, tile_tokens(params));
}

}  // namespace infllm::cuda::sm80
