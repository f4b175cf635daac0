// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/align/forward.cuh"
#include "infllm/backend/cuda/align/sums.cuh"
#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/shapes.cuh"

namespace infllm::cuda::align {
namespace {

template <int D>
struct TargetShared {
  std::byte q[kTileRows * 2 * D];
  std::byte k[2][kTileKeys * 2 * D];
  RowPlace places[kTileRows];
  float sums[kTileRows];
};

// Block (x, y, z): a tile of entries, KV head y, part z of the blocks. kMass: the second pass.
template <typename T, int D, bool kMass>
__global__ void __launch_bounds__(kThreads) target_kernel(const __grid_constant__ ForwardArgs f) {
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<TargetShared<D>*>(memory);
  const AlignArgs& a = f.a;
  const EntryTile tile(a, static_cast<int>(blockIdx.x));
  const int head = static_cast<int>(blockIdx.y);
  const LaneRows at;
  load_places(a, tile, shared.places);
  __syncthreads();
  load_queries<T, D>(a, tile, shared.places, a.q, head, shared.q);
  tile::cp_async_commit();

  const std::int64_t planes = std::int64_t{a.num_rows} * a.group;
  const std::int64_t first_row =
      head * planes + std::int64_t{tile.first} * a.group;  // of one split
  const int rows = tile.entries * a.group;
  RunningSums sums;
  float inverse[4];
  if constexpr (kMass) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = min(at.row(i), rows - 1);
      float l = 0;
      for (int z = 0; z < f.splits; ++z) {
        const float2 part = f.partials[z * a.pool.map.heads * planes + first_row + row];
        const float top = fmaxf(sums.m[i], part.x);
        l = l * tile::fast_exp2(sums.m[i] - top) + part.y * tile::fast_exp2(part.x - top);
        sums.m[i] = top;
      }
      inverse[i] = l > 0 ? 1 / l : 0;
    }
  }

  for (Visit visit = next_visit(shared.places, tile, -1); visit.sequence >= 0;
       visit = next_visit(shared.places, tile, visit.sequence)) {
    const Sequence sequence(a.batch, visit.sequence);
    const int begin = kMass ? a.init_blocks : 0;
    const int end = kMass ? visit.end_block : (visit.length + kPageTokens - 1) / kPageTokens;
    const int part = (end - begin + f.splits - 1) / f.splits;
    const int first = begin + static_cast<int>(blockIdx.z) * part;
    const int last = min(end, first + part);
    const auto load_block = [&](int block) {
      if (block < last) {
        const int page = sequence.page(block, a.pool.num_pages);
        SmemTile<D>::template load<kTileKeys, kThreads>(
            shared.k[block % 2], a.pool.plane<const std::byte>(max(page, 0), a.pool.map.key(head)),
            page < 0 ? 0 : sequence.length - block * kPageTokens);
      }
      tile::cp_async_commit();
    };
    load_block(first);
    for (int block = first; block < last; ++block) {
      tile::cp_async_wait<0>();
      __syncthreads();  // the block has arrived, and the one before is done with
      load_block(block + 1);
      float s[2][8][4];
      sm80::multiply_transposed<T, D>(s, shared.q, at.warp * kWarpRows, shared.k[block % 2], 0,
                                      at.lane);
      const bool is_there = sequence.page(block, a.pool.num_pages) >= 0;
      if constexpr (!kMass) {
        int limit[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int entry = at.row(i) / a.group;
          const bool takes_part =
              is_there && entry < tile.entries && shared.places[entry].sequence == visit.sequence;
          limit[i] = takes_part ? shared.places[entry].position + 1 - block * kPageTokens : 0;
        }
        sums.take(s, limit, a.c, at);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float sum = 0;
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            sum += tile::fast_exp2(fmaf(s[i / 2][n][i % 2 * 2], a.c, -sums.m[i]));
            sum += tile::fast_exp2(fmaf(s[i / 2][n][i % 2 * 2 + 1], a.c, -sums.m[i]));
          }
          sum += __shfl_xor_sync(0xffffffff, sum, 1);
          sum += __shfl_xor_sync(0xffffffff, sum, 2);
          if ((at.lane & 3) == 0) shared.sums[at.row(i)] = is_there ? sum * inverse[i] : 0;
        }
        __syncthreads();
        const int entry = static_cast<int>(threadIdx.x);
        if (entry < tile.entries && shared.places[entry].sequence == visit.sequence &&
            block < shared.places[entry].end_block) {
          float mass = 0;
          for (int h = 0; h < a.group; ++h) mass += shared.sums[entry * a.group + h];
          const std::int64_t row = std::int64_t{head} * a.num_rows + tile.first + entry;
          a.grad_scores[row * a.blocks + block] = mass / static_cast<float>(a.group);
        }
      }
    }
    tile::cp_async_wait<0>();
    __syncthreads();  // before the next sequence's keys
  }
  if constexpr (!kMass) {
    sums.finish();
    float2* out = f.partials + blockIdx.z * a.pool.map.heads * planes + first_row;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((at.lane & 3) == 0 && at.row(i) < rows) out[at.row(i)] = {sums.m[i], sums.l[i]};
    }
  }
}

}  // namespace

Status find_target(const KvLayout& layout, cudaStream_t stream, const ForwardArgs& args) {
  const dim3 grid(static_cast<unsigned>(tiles_of(args.a)),
                  static_cast<unsigned>(args.a.pool.map.heads), static_cast<unsigned>(args.splits));
  return with_shape(layout, [&]<typename T, int D>() -> Status {
    constexpr std::size_t kBytes = sizeof(TargetShared<D>);
    INFLLM_TRY(start("align", target_kernel<T, D, false>, grid, kThreads, kBytes, stream, args));
    return start("align", target_kernel<T, D, true>, grid, kThreads, kBytes, stream, args);
  });
}

}  // namespace infllm::cuda::align
