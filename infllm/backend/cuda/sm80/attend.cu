// SPDX-License-Identifier: Apache-2.0
//
// Attention of a tile of neighbouring tokens (row_tile.cuh), 32 rows a warp. The tile walks its
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

#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/heads.h"
#include "infllm/backend/cuda/powers.cuh"
#include "infllm/backend/cuda/sm80/attend.h"
#include "infllm/backend/cuda/sm80/row_tile.cuh"

namespace infllm::cuda::sm80 {
namespace {

constexpr int kSteps = 32;  // steps that are looked up together

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
  float c;  // exponent_of(scale)
};

// A ring of three slots for dense tiles; of two for sparse ones, so that four thread blocks fit.
// (Sparse with 64 rows and three slots: 19% slower. 128 rows: slower still.)
constexpr int slots_of(int warps) { return warps == kDenseWarps ? 3 : 2; }
// Warps that their registers, up to 255 or 168 a thread, let onto a multiprocessor.
template <int D>
inline constexpr int kResidentWarps = D == 128 ? 8 : 12;

template <int D, int kWarps>
struct Shared {
  std::byte q[kWarps * kWarpRows * 2 * D];
  std::byte ring[slots_of(kWarps)][kPageTokens * 2 * D];
  Visit steps[2][kSteps];  // those being visited and the next ones
};

template <typename T, int D, int kWarps>
class Attender : RowTile<T, D, kWarps, AttendArgs> {
 public:
  __device__ Attender(const AttendArgs& args, Shared<D, kWarps>& shared, const TokenTile& tile,
                      int slot)
      : Base(args, tile, slot), shared_(shared) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      m_[i] = kNoMaximum;
      l_[i] = 0;
    }
    clear(o_);
  }

  __device__ void run() {
    look_up_steps(0);
    this->load_rows(shared_.q, static_cast<const T*>(a_.q));
    __syncthreads();  // the steps
#pragma unroll
    for (int i = 0; i < kSlots - 1; ++i) load_tile(i);
    for (int j = 0; j < count_; ++j) {
      const bool wanted = next_tile(2 * j);
      if (j % kSteps == 0) look_up_steps(j / kSteps + 1);
      float s[2][8][4];
      if (wanted) {
        multiply_transposed<T, D>(s, shared_.q, warp_ * kWarpRows, slot(2 * j), 0, lane_);
        this->mask(s, step(j), step(j).block * kPageTokens);
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
  using Base = RowTile<T, D, kWarps, AttendArgs>;
  using Base::a_, Base::count_, Base::head_, Base::lane_, Base::rows_, Base::tile_, Base::warp_;
  static constexpr int kSlots = slots_of(kWarps);

  __device__ const Visit& step(int j) const { return shared_.steps[j / kSteps % 2][j % kSteps]; }
  __device__ std::byte* slot(int tile) const { return shared_.ring[tile % kSlots]; }

  // Warp 0 looks up the blocks and pages of steps chunk * kSteps ..
  __device__ void look_up_steps(int chunk) {
    const int j = chunk * kSteps + lane_;
    if (warp_ != 0 || j >= count_) return;
    shared_.steps[chunk % 2][lane_] = this->look_up(j);
  }

  // Starts the copy of tile 2 j (keys of step j) or 2 j + 1 (its values), one group in any case.
  __device__ void load_tile(int tile) {
    if (tile / 2 < count_) {
      const auto& planes = a_.pool.map;
      this->load_plane(slot(tile), step(tile / 2),
                       tile % 2 == 0 ? planes.key(head_) : planes.value(head_));
    }
    tile::cp_async_commit();
  }

  // Waits for a tile, frees the slot of the one before it and refills it. Returns whether this warp
  // has use for the tile's block.
  __device__ bool next_tile(int tile) {
    tile::cp_async_wait<kSlots - 2>();
    __syncthreads();
    load_tile(tile + kSlots - 1);
    return this->wants(step(tile / 2));
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

  // Divides by the sums and writes O and LSE.
  __device__ void finish() {
    float inverse[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float l = l_[i];
      l += __shfl_xor_sync(0xffffffff, l, 1);
      l += __shfl_xor_sync(0xffffffff, l, 2);
      inverse[i] = l > 0 ? 1 / l : 0;
      const int row = this->row(i);
      if (a_.lse != nullptr && (lane_ & 3) == 0 && row < rows_) {
        a_.lse[this->query_head(row) * a_.batch.num_tokens + tile_.token + row / a_.group] =
            l > 0 ? m_[i] * kLn2 + logf(l) : -INFINITY;
      }
    }
    this->store_rows(shared_.q, o_, inverse, static_cast<T*>(a_.o));
  }

  Shared<D, kWarps>& shared_;
  float m_[4];
  float l_[4];
  float o_[2][D / 8][4];
};

template <typename T, int D, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, kResidentWarps<D> / kWarps)
    attend_kernel(const __grid_constant__ AttendArgs args) {
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<Shared<D, kWarps>*>(memory);
  with_row_tile(args, [&](const TokenTile& tile, int slot) {
    Attender<T, D, kWarps>(args, shared, tile, slot).run();
  });
}

}  // namespace

Status attend(const Backend& backend, const AttendParams& params, std::span<std::byte> workspace) {
  const KvLayout& layout = params.pages.layout;
  INFLLM_TRY(check_heads("attend", layout, params.heads_q, kTileRows));
  const Device& device = device_of(backend);
  const int tokens = row_tile_tokens(params);
  AttendArgs args{.pool = PagePool(params.pages),
                  .batch = params.batch,
                  .q = params.q,
                  .o = params.o,
                  .lse = static_cast<float*>(params.lse),
                  .heads_q = params.heads_q,
                  .group = params.heads_q / layout.kv_heads,
                  .tile_tokens = tokens,
                  .c = exponent_of(params.scale)};
  if (is_sparse(params)) {
    Arena arena(workspace);
    args.lists = INFLLM_TRY(build_union_lists(backend, params, tokens, arena));
  }
  return with_row_shape(params, [&]<typename T, int D, int kWarps>() {
    return launch_row_tiles<sizeof(Shared<D, kWarps>), kWarps>(
        "attend", attend_kernel<T, D, kWarps>, args, device.stream);
  });
}

std::size_t attend_bytes(const Backend&, const AttendParams& params) {
  if (params.selection == nullptr) return 0;
  return union_bytes(params, row_tile_tokens(params));
}

}  // namespace infllm::cuda::sm80
