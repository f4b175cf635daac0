// SPDX-License-Identifier: Apache-2.0
//
// What compute-sanitizer's racecheck knows of barriers: four ways to hand shared memory on, none of
// which races by the PTX memory model, and one that does. It must report the last; of the others
// that it reports, a report about a kernel that uses them says nothing.
//
//   compute-sanitizer --tool racecheck race_probe WAY
//
//   group    within a warpgroup, at a named barrier
//   all      from one warpgroup to another: every writer arrives at an mbarrier
//   leader   writers meet at a named barrier, one arrives at the mbarrier
//   refill   the same, and then the copy engine fills the memory anew
//   none     nobody waits
#include <cstring>

#include "bench/probes/probe.cuh"
#include "infllm/backend/cuda/tile/barrier.cuh"
#include "infllm/backend/cuda/tile/tma.cuh"

namespace infllm::probes {

enum class Way { kGroup, kAll, kLeader, kRefill, kNone };

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
    if (way == Way::kGroup) out[threadIdx.x] = words[(threadIdx.x + 1) % 128];
    return;
  }
  if (way == Way::kGroup) return;
  if (way != Way::kNone) mbarrier_wait(&empty, 0);
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
  const char* words[] = {"group", "all", "leader", "refill", "none"};
  int which = 0;
  while (which < 5 && (argc < 2 || std::strcmp(argv[1], words[which]) != 0)) ++which;
  if (which == 5) return std::printf("usage: race_probe group | all | leader | refill | none\n"), 2;
  const Way way = static_cast<Way>(which);
  unsigned* memory;
  must(cudaMalloc(&memory, 1024));
  must(cudaMemset(memory, 0, 1024));
  hand_over<<<1, 256>>>(way, memory, memory + 128);
  must(cudaGetLastError());
  unsigned out[128];
  must(cudaMemcpy(out, memory + 128, sizeof(out), cudaMemcpyDeviceToHost));
  if (way == Way::kNone) return 0;
  const unsigned want = way == Way::kRefill ? 0 : 1;
  for (const unsigned x : out) {
    if (x != want) return std::printf("found %u, expected %u\n", x, want), 1;
  }
  std::printf("right\n");
  return 0;
}
