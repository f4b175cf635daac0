// SPDX-License-Identifier: Apache-2.0
//
// How fast Hopper's copy engine brings random blocks of 32 KB (K and V of one cache page of one
// head) into shared memory, by the size of the array they come from:
//
//   alone       every thread block draws its own blocks
//   neighbours  8 thread blocks walk the same list
//   multicast   pairs of a cluster walk one list; each loads half a block into both
#include "bench/probes/probe.cuh"
#include "infllm/backend/cuda/tile/barrier.cuh"
#include "infllm/backend/cuda/tile/control.cuh"

namespace infllm::probes {
namespace {

using namespace infllm::cuda::tile;

constexpr int kBlockBytes = 32768;
constexpr int kStages = 6;
constexpr int kLoads = 2000;  // of each thread block
constexpr int kShared = kStages * kBlockBytes + 1024;

__device__ unsigned draw(unsigned list, unsigned i) {
  unsigned long long x = (static_cast<unsigned long long>(list) << 32 | i) * 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 31)) * 0xBF58476D1CE4E5B9ull;
  return static_cast<unsigned>(x >> 33);
}

__device__ void load(std::byte* to, const std::byte* from, unsigned bytes, std::uint64_t* full,
                     unsigned short ctas) {
  if (ctas == 0) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(full))
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(full)), "h"(ctas)
        : "memory");
  }
}

template <bool kMulticast>
__global__ void __launch_bounds__(64) stream(const std::byte* array, unsigned blocks, int share) {
  extern __shared__ __align__(1024) std::byte memory[];
  __shared__ std::uint64_t full[kStages], empty[kStages];
  const unsigned rank = kMulticast ? cluster_rank() : 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], kMulticast ? 2 : 1);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if constexpr (kMulticast) cluster_sync();
  const unsigned list = blockIdx.x / static_cast<unsigned>(share);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kLoads; ++i) {
      const int stage = i % kStages;
      mbarrier_wait(&empty[stage], (i / kStages & 1) ^ 1);
      mbarrier_arrive_expect_tx(&full[stage], kBlockBytes);
      const std::byte* from =
          array + static_cast<std::size_t>(draw(list, i) % blocks) * kBlockBytes;
      std::byte* to = memory + stage * kBlockBytes;
      if constexpr (kMulticast) {
        const unsigned half = rank * (kBlockBytes / 2);
        load(to + half, from + half, kBlockBytes / 2, &full[stage], 3);
      } else {
        load(to, from, kBlockBytes, &full[stage], 0);
      }
    }
  } else if (threadIdx.x == 32) {
    for (int i = 0; i < kLoads; ++i) {
      const int stage = i % kStages;
      mbarrier_wait(&full[stage], i / kStages & 1);
      if constexpr (kMulticast) {
        mbarrier_arrive_remote(&empty[stage], 0);
        mbarrier_arrive_remote(&empty[stage], 1);
      } else {
        mbarrier_arrive(&empty[stage]);
      }
    }
  }
  if constexpr (kMulticast) cluster_sync();
}

void report(const char* mode, std::size_t bytes, double ms, int ctas) {
  std::printf(
      "{\"name\":\"probe.tma\",\"mode\":\"%s\",\"footprint_mb\":%zu,\"ms\":%.3f,\"tbps\":%.2f}\n",
      mode, bytes >> 20, ms, static_cast<double>(ctas) * kLoads * kBlockBytes / ms * 1e-9);
}

void run() {
  const int ctas = sm_count() / 2 * 2;
  const std::size_t most = std::size_t{512} << 20;
  unsigned* words = nullptr;
  must(cudaMalloc(&words, most));
  fill_random<<<1024, 256>>>(words, static_cast<long long>(most / 4));
  const auto* array = reinterpret_cast<const std::byte*>(words);
  must(cudaFuncSetAttribute(stream<false>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  must(cudaFuncSetAttribute(stream<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  for (const std::size_t mb : {8, 24, 48, 64, 128, 512}) {
    const std::size_t bytes = mb << 20;
    const auto blocks = static_cast<unsigned>(bytes / kBlockBytes);
    report("alone", bytes,
           median_ms([&] { stream<false><<<ctas, 64, kShared>>>(array, blocks, 1); }), ctas);
    report("neighbours", bytes,
           median_ms([&] { stream<false><<<ctas, 64, kShared>>>(array, blocks, 8); }), ctas);
    report("multicast", bytes, median_ms([&] {
             cudaLaunchAttribute cluster{};
             cluster.id = cudaLaunchAttributeClusterDimension;
             cluster.val.clusterDim = {2, 1, 1};
             cudaLaunchConfig_t config{};
             config.gridDim = dim3(static_cast<unsigned>(ctas));
             config.blockDim = dim3(64);
             config.dynamicSmemBytes = kShared;
             config.attrs = &cluster;
             config.numAttrs = 1;
             must(cudaLaunchKernelEx(&config, stream<true>, array, blocks, 2));
           }),
           ctas);
  }
}

}  // namespace
}  // namespace infllm::probes

int main() { infllm::probes::run(); }
