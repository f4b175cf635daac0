// SPDX-License-Identifier: Apache-2.0
//
// What compute-sanitizer's racecheck knows of mbarriers: three ways to hand shared memory from one
// warpgroup to another, none of which races by the PTX memory model. Of the ways that it reports, a
// report about a kernel that uses them says nothing; gpu_sanitize.sh looks here.
//
//   compute-sanitizer --tool racecheck race_probe all      every writer arrives at the mbarrier
//   compute-sanitizer --tool racecheck race_probe leader   writers meet at a named barrier, one
//   arrives compute-sanitizer --tool racecheck race_probe refill   then the copy engine fills the
//   memory anew
#include <cstring>

#include "bench/probes/probe.cuh"
#include "infllm/backend/cuda/tile/barrier.cuh"
#include "infllm/backend/cuda/tile/tma.cuh"

namespace infllm::probes {

enum class Way { kAll, kLeader, kRefill };

__global__ void __launch_bounds__(256, 1) hand_over(Way way, const unsigned* from, unsigned* out) {
  using namespace cuda::tile;
  __shared__ alignas(128) unsigned words[128];
  __shared__ std::uint64_t empty, full;
  if (threadIdx.x == 0) {
    mbarrier_init(&empty, way == Way::kAll ? 128 : 1);
    mbarrier_init(&full, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {  // writes, and is done with the memory
    words[threadIdx.x] = 1;
    fence_async_proxy();
    if (way != Way::kAll) named_barrier_sync(1, 128);
    if (way == Way::kAll || threadIdx.x == 0) mbarrier_arrive(&empty);
    return;
  }
  mbarrier_wait(&empty, 0);
  if (way == Way::kRefill) {
    if (threadIdx.x == 128) {
      mbarrier_arrive_expect_tx(&full, sizeof(words));
      tma_load_1d(&full, words, from, sizeof(words));
    }
    mbarrier_wait(&full, 0);
  }
  out[threadIdx.x - 128] = words[(threadIdx.x + 1) % 128];  // another thread's
}

}  // namespace infllm::probes

int main(int argc, char** argv) {
  using namespace infllm::probes;
  const char* word = argc > 1 ? argv[1] : "";
  const Way way = std::strcmp(word, "all") == 0      ? Way::kAll
                  : std::strcmp(word, "leader") == 0 ? Way::kLeader
                                                     : Way::kRefill;
  unsigned* memory;
  must(cudaMalloc(&memory, 1024));
  must(cudaMemset(memory, 0, 1024));
  hand_over<<<1, 256>>>(way, memory, memory + 128);
  must(cudaGetLastError());
  unsigned out[128];
  must(cudaMemcpy(out, memory + 128, sizeof(out), cudaMemcpyDeviceToHost));
  const unsigned want = way == Way::kRefill ? 0 : 1;
  for (const unsigned x : out) {
    if (x != want) return std::printf("found %u, expected %u\n", x, want), 1;
  }
  std::printf("right\n");
  return 0;
}
