// SPDX-License-Identifier: Apache-2.0
//
// What the decode rows share: a row is one (sequence, KV head) with one token, worked on by several
// thread blocks, its parts. From 9.0 on the parts of a row are a cluster: they start together, wait
// for each other in the middle of a kernel, and read each other's shared memory.
#pragma once

#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/page.cuh"
#include "infllm/backend/cuda/tile/control.cuh"
#include "infllm/ops/sparse_config.h"

namespace infllm::cuda::decode {

inline constexpr unsigned kAllLanes = 0xffffffff;
inline constexpr float kInfinity = __builtin_huge_valf();
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// Blocks of a cluster: what every device of 9.0 takes, and what this one may take.
inline constexpr unsigned kPortableCluster = 8;
inline constexpr unsigned kLargestCluster = 16;

inline constexpr int kRowHeads = 16;  // of a group that a product takes at a time

inline constexpr int kMaxCandidates = 16384;  // blocks to choose from: 1M tokens

// Logarithms of the pooled rows of a page.
inline constexpr int kFineShift = 2;
inline constexpr int kCoarseShift = 0;
static_assert(kFineRows == 1 << kFineShift && kCoarseRows == 1 << kCoarseShift);

// Pooled keys of one kind, of one sequence and KV head.
struct PooledRows {
  std::int64_t offset;  // of the plane in a page
  int page_shift;       // logarithm of a page's rows
  int end;              // windows that exist
};
__device__ __forceinline__ PooledRows fine_rows(const PagePool& pool, int head, int length) {
  return {pool.map.fine(head), kFineShift, fine_windows(length)};
}
__device__ __forceinline__ PooledRows coarse_rows(const PagePool& pool, int head, int length) {
  return {pool.map.coarse(head), kCoarseShift, coarse_windows(length)};
}

__device__ __forceinline__ std::uint32_t word(const uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

// Where part `index` of `parts` begins when `total` things are shared out; total times parts fits
// 32 bits.
__device__ __forceinline__ int share(int total, int index, int parts) {
  return static_cast<int>(static_cast<unsigned>(total * index) / static_cast<unsigned>(parts));
}

// How the chosen blocks of a token in block `own` come about (ops/select.h): `columns` of them, the
// sinks 0 .. sinks - 1, the locals first_local .. own, and `free` ones by score from
// [init_blocks, first_local). Then a list is sinks, free ones, locals, ascending as it stands.
struct Forced {
  __host__ __device__ Forced(int own, int init_blocks, int local_blocks, int columns) {
    const int window = own + 1 < local_blocks ? own + 1 : local_blocks;
    if (own + 1 <= columns) {  // every causal block fits
      sinks = 0;
      locals = own + 1;
      free = 0;
    } else {
      const int before = own + 1 - window;
      const int sink = init_blocks < before ? init_blocks : before;
      locals = window < columns ? window : columns;
      sinks = sink < columns - locals ? sink : columns - locals;
      free = columns - locals - sinks;
    }
    first_local = own + 1 - locals;
  }

  __device__ int count() const { return sinks + locals; }
  // The i-th forced block, ascending.
  __device__ int block(int i) const { return i < sinks ? i : first_local + i - sinks; }

  int sinks, locals, free, first_local;
};

// All threads of all blocks of the cluster; of the block where there are no clusters. Orders global
// memory too.
__device__ __forceinline__ void wait_for_parts() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  tile::cluster_sync();
#else
  __syncthreads();
#endif
}

// This block's rank in its cluster and the cluster's size: 0 and 1 without clusters.
__device__ __forceinline__ int part_rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return static_cast<int>(tile::cluster_rank());
#else
  return 0;
#endif
}
__device__ __forceinline__ int part_count() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  std::uint32_t count;
  asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(count));
  return static_cast<int>(count);
#else
  return 1;
#endif
}

// The same place in the shared memory of the block of that rank, as a generic address.
template <typename U>
__device__ __forceinline__ U* in_part(U* address, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  std::uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(address), "r"(rank));
  return reinterpret_cast<U*>(there);
#else
  return address;
#endif
}

// launch() of launch.cuh, for blocks whose `cluster` neighbours along x are one cluster; 1: none.
// all_at_once: every block of the grid is resident before any of them has to wait for another one,
// whatever else runs on the device; a grid that does not fit is an error.
template <typename Args>
Status launch_parts(const Device& device, std::string_view step, void (*kernel)(Args), dim3 grid,
                    unsigned threads, std::size_t shared_bytes, unsigned cluster, const Args& args,
                    bool all_at_once = false) {
  cudaLaunchAttribute attributes[3] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  unsigned count = device.capability < 90 ? 0 : 1;
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {cluster, 1, 1};
  }
  if (all_at_once) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = device.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return to_status(step, cudaLaunchKernelEx(&config, kernel, args));
}

struct Clusters {
  unsigned size;
  std::int64_t count;  // that run at the same time
};

// The largest clusters, of up to `wanted` blocks, of which `rows` find room on the device at the
// same time; one that had to wait for another one's end would take as long again. With size 1 the
// count is a guess: `rows`.
template <typename Args>
Result<Clusters> fitting_cluster(std::string_view step, void (*kernel)(Args), unsigned threads,
                                 std::size_t shared_bytes, unsigned wanted, std::int64_t rows) {
  if (wanted > kPortableCluster) {
    INFLLM_TRY(to_status(
        step, cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)));
  }
  for (unsigned size = wanted; size > 1;
       size = size > kPortableCluster ? kPortableCluster : size - 1) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {size, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(size);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int found = 0;
    if (cudaOccupancyMaxActiveClusters(&found, kernel, &config) != cudaSuccess) {
      static_cast<void>(cudaGetLastError());  // no cluster of that size here
    }
    if (found >= rows) return Clusters{size, found};
  }
  return Clusters{1, rows};
}

}  // namespace infllm::cuda::decode
