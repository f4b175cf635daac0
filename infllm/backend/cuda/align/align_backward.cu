// SPDX-License-Identifier: Apache-2.0
//
// The way back, in three kernels that own what they write. query_kernel walks the pooled keys for a
// tile of entries and sums dQ; the rows' X, which the next kernel needs, is written too.
// pool_kernel walks the entries for a tile of 64 pooled keys, products turned round so that dx^T is
// a left operand as it lies in registers, and sums dKC. share_kernel gives every key its share of
// the windows that hold it.
//
// dx = exp(x - s) ds needs s of the whole group: logits go through shared memory as in align.cu,
// and s and ds come back in the first two of the group's rows.
#include "infllm/backend/cuda/align/align.h"
#include "infllm/backend/cuda/align/sums.cuh"
#include "infllm/backend/cuda/heads.h"
#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/shapes.cuh"
#include "infllm/core/arena.h"

namespace infllm::cuda::align {
namespace {

struct BackwardArgs {
  AlignArgs a;
  const float* grad_loss;  // [Hkv, R]
  void* grad_q;            // [R, Hq, D]
  void* grad_k;            // [keys, Hkv, D]
  float* x;                // [Hq, R] X
  float* pooled;           // [B, Hkv, fine + coarse, D] dKC
  int fine;                // rows of whole tiles; 64 times a number
  int coarse;              // 0: the fine ones normalise
};

// Turns a group's logits x (base 2, norm subtracted) of 64 windows from `first` on, which lie in
// y [row][window], into what its rows need: s in the first row and ds in the second one; with one
// head alone, whose weight is 1, ds.
__device__ void reduce_group(const BackwardArgs& b, const EntryTile& tile, const RowPlace* places,
                             int sequence, int head, int first, float* y) {
  const AlignArgs& a = b.a;
  for (int i = static_cast<int>(threadIdx.x); i < tile.entries * kTileKeys; i += kThreads) {
    const int entry = i / kTileKeys;
    const int window = first + i % kTileKeys;
    const RowPlace& place = places[entry];
    if (place.sequence != sequence) continue;
    const std::int64_t row = std::int64_t{head} * a.num_rows + tile.first + entry;
    // A window belongs to the block that it begins in and may reach into the next one.
    float grad = 0;
    for (int block = window / kFineRows;
         block <= (window * kFineStride + kFineTokens - 1) / kPageTokens; ++block) {
      const bool is_free = block >= a.init_blocks && block < place.end_block;
      if (is_free && a.windows[row * a.blocks + block] == window) {
        grad += a.grad_scores[row * a.blocks + block];
      }
    }
    grad *= b.grad_loss[row];
    float* column = y + entry * a.group * kScoreStride + i % kTileKeys;
    if (a.group == 1) {
      column[0] = grad;
      continue;
    }
    column[0] = GroupSum(column, a.group).log();
    column[kScoreStride] = grad;
  }
}

// dx of one element, from its logit and what reduce_group() left for its entry.
__device__ __forceinline__ float score_gradient(float x, const float* column, int group) {
  return group == 1 ? column[0] : tile::fast_exp2(x - column[0]) * column[kScoreStride];
}

template <int D>
struct QueryShared {
  std::byte q[kTileRows * 2 * D];
  std::byte k[2][kTileKeys * 2 * D];
  float y[kTileRows * kScoreStride];
  RowPlace places[kTileRows];
};

// Block (x, y): a tile of entries, KV head y.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads) query_kernel(const __grid_constant__ BackwardArgs b) {
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<QueryShared<D>*>(memory);
  const AlignArgs& a = b.a;
  const EntryTile tile(a, static_cast<int>(blockIdx.x));
  const int head = static_cast<int>(blockIdx.y);
  const int rows = tile.entries * a.group;
  const LaneRows at;
  load_places(a, tile, shared.places);
  __syncthreads();
  load_queries<T, D>(a, tile, shared.places, a.q_score, head, shared.q);
  tile::cp_async_commit();

  float grad_q[2][D / 8][4];
  sm80::clear(grad_q);
  int entry[4];
  float norm[4];  // base 2
  float x[4];     // X
  std::int64_t stat[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = min(at.row(i), rows - 1);
    entry[i] = row / a.group;
    stat[i] = (std::int64_t{head} * a.group + row - entry[i] * a.group) * a.num_rows + tile.first +
              entry[i];
    norm[i] = a.norms[stat[i]] * kLog2E;
    x[i] = 0;
  }

  for (Visit visit = next_visit(shared.places, tile, -1); visit.sequence >= 0;
       visit = next_visit(shared.places, tile, visit.sequence)) {
    const Sequence sequence(a.batch, visit.sequence);
    bool takes_part[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      takes_part[i] = at.row(i) < rows && shared.places[entry[i]].sequence == visit.sequence;
    }
    const Pooled fine(a, false, head);
    const WindowRange range(a, fine, visit);
    for_each_tile<D>(
        a, sequence, fine, range.begin, range.end, shared.k, [&](int first, const std::byte* keys) {
          float s[2][8][4];
          sm80::multiply_transposed<T, D>(s, shared.q, at.warp * kWarpRows, keys, 0, at.lane);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float* y = shared.y + at.row(i) * kScoreStride;
#pragma unroll
            for (int n = 0; n < 8; ++n) {
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                float& value = s[i / 2][n][i % 2 * 2 + e];
                value = fmaf(value, a.c, -norm[i]);
                y[at.column(n) + e] = value;
              }
            }
          }
          __syncthreads();
          reduce_group(b, tile, shared.places, visit.sequence, head, first, shared.y);
          __syncthreads();
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* y = shared.y + entry[i] * a.group * kScoreStride;
#pragma unroll
            for (int n = 0; n < 8; ++n) {
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                float& value = s[i / 2][n][i % 2 * 2 + e];
                value = takes_part[i] ? score_gradient(value, y + at.column(n) + e, a.group) : 0;
                x[i] += value;
              }
            }
          }
          sm80::multiply_add<T, D>(grad_q, s, keys, 0, at.lane);
        });
    float factor[4];
    int visible[4];
    const Pooled norm_keys = normaliser(a, head);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float total = takes_part[i] ? x[i] : 0;
      total += __shfl_xor_sync(0xffffffff, total, 1);
      total += __shfl_xor_sync(0xffffffff, total, 2);
      factor[i] = -total;
      visible[i] = takes_part[i] ? norm_keys.count(shared.places[entry[i]].position + 1) : 0;
      if (takes_part[i] && (at.lane & 3) == 0) b.x[stat[i]] = total;
    }
    for_each_tile<D>(
        a, sequence, norm_keys, 0, norm_keys.count(visit.length), shared.k,
        [&](int first, const std::byte* keys) {
          float s[2][8][4];
          sm80::multiply_transposed<T, D>(s, shared.q, at.warp * kWarpRows, keys, 0, at.lane);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int n = 0; n < 8; ++n) {
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                float& value = s[i / 2][n][i % 2 * 2 + e];
                const bool is_seen = first + at.column(n) + e < visible[i];
                value = is_seen ? factor[i] * tile::fast_exp2(fmaf(value, a.c, -norm[i])) : 0;
              }
            }
          }
          sm80::multiply_add<T, D>(grad_q, s, keys, 0, at.lane);
        });
  }

  tile::cp_async_wait<0>();
  __syncthreads();  // the queries have arrived even if there was nothing to visit
  T* out = static_cast<T*>(b.grad_q);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (at.row(i) >= rows) continue;
    const std::int64_t row = (std::int64_t{tile.first} + entry[i]) * a.heads_q + head * a.group +
                             at.row(i) - entry[i] * a.group;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      *reinterpret_cast<std::uint32_t*>(out + row * D + at.column(n)) = tile::pack2<T>(
          grad_q[i / 2][n][i % 2 * 2] * a.scale, grad_q[i / 2][n][i % 2 * 2 + 1] * a.scale);
    }
  }
}

template <int D>
struct PoolShared {
  std::byte k[kTileKeys * 2 * D];
  std::byte q[kTileRows * 2 * D];
  float y[kTileRows * kScoreStride];
  RowPlace places[kTileRows];
  std::int32_t entry[kTileRows];  // of a row; -1: it is none, or of another sequence
  std::int32_t visible[kTileRows];
  float norm[kTileRows];  // base 2
  float x[kTileRows];     // X
};

// Block (x, y): a tile of pooled keys, sequence y / Hkv and KV head y % Hkv.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads) pool_kernel(const __grid_constant__ BackwardArgs b) {
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<PoolShared<D>*>(memory);
  const AlignArgs& a = b.a;
  const int index = static_cast<int>(blockIdx.y) / a.pool.map.heads;
  const int head = static_cast<int>(blockIdx.y) % a.pool.map.heads;
  const int warp = tile::warp_index();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool is_fine = static_cast<int>(blockIdx.x) * kTileKeys < b.fine;
  const bool normalises = !is_fine || !a.from_coarse;
  const int first = static_cast<int>(blockIdx.x) * kTileKeys - (is_fine ? 0 : b.fine);
  const Sequence sequence(a.batch, index);
  const Pooled keys(a, !is_fine, head);
  const int end = keys.count(sequence.length);
  if (first >= end) return;

  float grad[1][D / 8][4];
  sm80::clear(grad);
  load_pooled<D>(a, sequence, keys, first, end, shared.k);
  for (int t = 0; t * a.tile_entries < a.num_rows; ++t) {
    const EntryTile tile(a, t);
    __syncthreads();  // everybody is done with the tile before
    load_places(a, tile, shared.places);
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x);
    const int entry = row / a.group;
    const bool takes_part = entry < tile.entries && shared.places[entry].sequence == index &&
                            keys.count(shared.places[entry].position + 1) > first;
    if (__syncthreads_or(takes_part) == 0) continue;
    load_queries<T, D>(a, tile, shared.places, a.q_score, head, shared.q);
    tile::cp_async_commit();
    shared.entry[row] = takes_part ? entry : -1;
    if (takes_part) {
      const std::int64_t query = std::int64_t{head} * a.group + row - entry * a.group;
      const std::int64_t stat = query * a.num_rows + tile.first + entry;
      shared.norm[row] = a.norms[stat] * kLog2E;
      shared.x[row] = b.x[stat];
      shared.visible[row] = keys.count(shared.places[entry].position + 1) - first;
    } else {
      shared.norm[row] = 0;
    }
    tile::cp_async_wait<0>();
    __syncthreads();
    float s[1][16][4];  // of 16 keys and all rows
    sm80::multiply_transposed<T, D>(s, shared.k, warp * 16, shared.q, 0, lane);
    const auto key_of = [&](int e) { return warp * 16 + e / 2 * 8 + (lane >> 2); };
    const auto row_of = [&](int n, int e) { return n * 8 + (lane & 3) * 2 + e % 2; };
    if (is_fine) {
#pragma unroll
      for (int n = 0; n < 16; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = row_of(n, e);
          shared.y[r * kScoreStride + key_of(e)] = fmaf(s[0][n][e], a.c, -shared.norm[r]);
        }
      }
      __syncthreads();
      reduce_group(b, tile, shared.places, index, head, first, shared.y);
      __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < 16; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = row_of(n, e);
        const float x = fmaf(s[0][n][e], a.c, -shared.norm[r]);
        float sum = 0;
        if (shared.entry[r] >= 0 && is_fine) {
          const float* column = shared.y + shared.entry[r] * a.group * kScoreStride + key_of(e);
          sum = score_gradient(x, column, a.group);
        }
        if (shared.entry[r] >= 0 && normalises && key_of(e) < shared.visible[r]) {
          sum -= shared.x[r] * tile::fast_exp2(x);
        }
        s[0][n][e] = sum;
      }
    }
    sm80::multiply_add<T, D>(grad, s, shared.q, 0, lane);
  }
  tile::cp_async_wait<0>();
  const std::int64_t out_row =
      std::int64_t{blockIdx.y} * (b.fine + b.coarse) + std::int64_t{blockIdx.x} * kTileKeys;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* out = b.pooled + (out_row + warp * 16 + half * 8 + (lane >> 2)) * D + (lane & 3) * 2;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      *reinterpret_cast<float2*>(out + n * 8) = {grad[0][n][half * 2], grad[0][n][half * 2 + 1]};
    }
  }
}

// Block (x, y): block x of sequence y / Hkv, KV head y % Hkv.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads) share_kernel(const __grid_constant__ BackwardArgs b) {
  const AlignArgs& a = b.a;
  const int heads = a.pool.map.heads;
  const int index = static_cast<int>(blockIdx.y) / heads;
  const int head = static_cast<int>(blockIdx.y) % heads;
  const int length = a.batch.kv_length[index];
  std::int64_t before = 0;
  for (int i = 0; i < index; ++i) before += a.batch.kv_length[i];
  const float* rows = b.pooled + std::int64_t{blockIdx.y} * (b.fine + b.coarse) * D;
  for (int i = static_cast<int>(threadIdx.x); i < kPageTokens * D; i += kThreads) {
    const int t = static_cast<int>(blockIdx.x) * kPageTokens + i / D;
    if (t >= length) return;
    const auto sum_of = [&](const float* from, int size, int stride, int windows) {
      float sum = 0;
      for (int j = t < size ? 0 : (t - size) / stride + 1; j <= t / stride && j < windows; ++j) {
        sum += from[std::int64_t{j} * D + i % D];
      }
      return sum / static_cast<float>(size);
    };
    float sum = sum_of(rows, kFineTokens, kFineStride, fine_windows(length));
    if (b.coarse > 0) {
      sum += sum_of(rows + std::int64_t{b.fine} * D, kCoarseTokens, kCoarseStride,
                    coarse_windows(length));
    }
    static_cast<T*>(b.grad_k)[((before + t) * heads + head) * D + i % D] = to<T>(sum * a.scale);
  }
}

int round_up(std::int64_t rows) {
  return static_cast<int>(ceil_div(rows, std::int64_t{kTileKeys}) * kTileKeys);
}
int fine_rows(const AlignParams& p) {
  return round_up(p.config.fine_windows(p.batch.max_kv_length));
}
int coarse_rows(const AlignParams& p) {
  return p.config.lse_source == LseSource::kFine
             ? 0
             : round_up(p.config.coarse_windows(p.batch.max_kv_length));
}
std::int64_t pooled_floats(const AlignParams& p) {
  return std::int64_t{p.batch.num_sequences} * p.pages.layout.kv_heads *
         (fine_rows(p) + coarse_rows(p)) * p.pages.layout.head_dim;
}

template <typename T, int D>
Status launch(cudaStream_t stream, const BackwardArgs& args) {
  const auto heads = static_cast<unsigned>(args.a.pool.map.heads);
  const unsigned pairs = heads * static_cast<unsigned>(args.a.batch.num_sequences);
  const auto tiles = static_cast<unsigned>((args.fine + args.coarse) / kTileKeys);
  INFLLM_TRY(start("align_backward", query_kernel<T, D>,
                   dim3(static_cast<unsigned>(tiles_of(args.a)), heads), kThreads,
                   sizeof(QueryShared<D>), stream, args));
  INFLLM_TRY(start("align_backward", pool_kernel<T, D>, dim3(tiles, pairs), kThreads,
                   sizeof(PoolShared<D>), stream, args));
  return start("align_backward", share_kernel<T, D>,
               dim3(static_cast<unsigned>(args.a.blocks), pairs), kThreads, 0, stream, args);
}

}  // namespace

Status align_backward(const Backend& backend, const AlignBackwardParams& params,
                      std::span<std::byte> workspace) {
  const AlignParams& f = params.forward;
  INFLLM_TRY(check_heads("align_backward", f.pages.layout, f.heads_q, kTileRows));
  Arena arena(workspace);
  auto* places = arena.take<RowPlace>(f.num_rows);
  const BackwardArgs args{.a = align_args(f, places),
                          .grad_loss = static_cast<const float*>(params.grad_loss),
                          .grad_q = params.grad_q,
                          .grad_k = params.grad_k,
                          .x = arena.take<float>(std::int64_t{f.num_rows} * f.heads_q),
                          .pooled = arena.take<float>(pooled_floats(f)),
                          .fine = fine_rows(f),
                          .coarse = coarse_rows(f)};
  const cudaStream_t stream = device_of(backend).stream;
  if (f.num_rows > 0) INFLLM_TRY(find_places(backend, "align_backward", args.a));
  return with_shape(f.pages.layout,
                    [&]<typename T, int D>() { return launch<T, D>(stream, args); });
}

std::size_t align_backward_bytes(const Backend&, const AlignBackwardParams& params) {
  const AlignParams& f = params.forward;
  ArenaSize size;
  size.take<RowPlace>(f.num_rows);
  size.take<float>(std::int64_t{f.num_rows} * f.heads_q);
  size.take<float>(pooled_floats(f));
  return size.bytes();
}

}  // namespace infllm::cuda::align
