// SPDX-License-Identifier: Apache-2.0
//
// Wrappers of infllm/backend/cuda/tile on the card (sm_90a) that order or cache accesses to memory:
// words handed from one thread block to another, loads by way of a cache, copies that a barrier
// waits for, the shared memory of a cluster. Exit status 1 on a failure.
#include "infllm/backend/cuda/tile/barrier.cuh"
#include "infllm/backend/cuda/tile/control.cuh"
#include "infllm/backend/cuda/tile/memory.cuh"
#include "infllm/backend/cuda/tile/mma.cuh"
#include "tests/cuda/tile_check.cuh"

namespace infllm::cuda::tile {
namespace {

constexpr std::uint32_t kNothing = 0xffffffff;

// What block 0 hands to block 1, which waits for it; all kNothing before.
struct Mail {
  alignas(16) std::uint32_t four[4];
  alignas(8) std::uint32_t two[2];
  std::uint32_t one;
  std::uint16_t half[2];
  std::uint32_t flag;
  std::uint32_t data[32];  // written as usual, before the flag
};

// Block 1 leaves what it saw in out: four, two, one, half, then data.
__global__ void hand_words(Mail* mail, std::uint32_t* out) {
  const int lane = static_cast<int>(threadIdx.x);
  if (blockIdx.x == 0) {
    for (int i = 0; i < 100; ++i) __nanosleep(100);
    mail->data[lane] = static_cast<std::uint32_t>(100 + lane);
    __syncwarp();
    if (lane == 0) {
      store_relaxed(mail->four, make_uint4(1, 2, 3, 4));
      store_relaxed(mail->two, make_uint2(5, 6));
      store_relaxed(&mail->one, 7);
      store_relaxed(&mail->half[1], std::uint16_t{8});
      store_release(&mail->flag, 9);
    }
    return;
  }
  while (load_acquire(&mail->flag) != 9) {
  }
  out[8 + lane] = mail->data[lane];
  if (lane > 0) return;
  uint4 four;
  uint2 two;
  std::uint32_t one;
  do {
    load_relaxed(mail->four, four);
    load_relaxed(mail->two, two);
    load_relaxed(&mail->one, one);
  } while (four.w == kNothing || two.y == kNothing || one == kNothing);
  const std::uint32_t seen[8] = {
      four.x, four.y, four.z, four.w,
      two.x,  two.y,  one,    std::uint32_t{mail->half[1]} << 16 | mail->half[0]};
  for (int i = 0; i < 8; ++i) out[i] = seen[i];
}

void test_words() {
  constexpr std::size_t kWords = sizeof(Mail) / 4;
  static_assert(sizeof(Mail) % 4 == 0);
  Managed<std::uint32_t> mail(std::vector<std::uint32_t>(kWords, kNothing));
  Managed<std::uint32_t> out(8 + 32);
  hand_words<<<2, 32>>>(reinterpret_cast<Mail*>(mail.device), out.device);
  must(cudaGetLastError());
  const auto& got = out.read();
  bool words = true, data = true;
  for (std::uint32_t i = 0; i < 7; ++i) words = words && got[i] == i + 1;
  words = words && got[7] == (8u << 16 | 0xffff);
  for (std::uint32_t i = 0; i < 32; ++i) data = data && got[8 + i] == 100 + i;
  verdict("relaxed words of 2, 4, 8 and 16 bytes reach another block", words);
  verdict("what stands before a release is there behind the acquire", data);
}

__global__ void load_by_caches(const std::uint32_t* in, std::uint32_t* out) {
  __shared__ alignas(8) std::uint32_t here[64];
  const int lane = static_cast<int>(threadIdx.x);
  if (lane == 0) prefetch_l2(in, 32 * 16);
  here[2 * lane] = in[2 * lane];
  here[2 * lane + 1] = in[2 * lane + 1];
  __syncwarp();
  const auto* const quads = reinterpret_cast<const uint4*>(in) + lane;
  const uint4 cg = load_cg(quads), ca = load_ca(quads);
  const uint2 global = load_volatile(reinterpret_cast<const uint2*>(in) + lane);
  const uint2 shared = load_volatile(reinterpret_cast<const uint2*>(here) + lane);
  const bool same = cg.x == ca.x && cg.y == ca.y && cg.z == ca.z && cg.w == ca.w &&
                    cg.x == in[4 * lane] && cg.y == in[4 * lane + 1] && cg.z == in[4 * lane + 2] &&
                    cg.w == in[4 * lane + 3];
  const bool pairs = global.x == in[2 * lane] && global.y == in[2 * lane + 1] &&
                     shared.x == global.x && shared.y == global.y;
  const auto* const word = reinterpret_cast<const std::int32_t*>(in) + lane;
  const auto* const byte = reinterpret_cast<const std::uint8_t*>(in) + lane;
  const bool small = load_ca(word) == *word && load_ca(byte) == *byte;
  out[lane] = (same ? 1 : 0) | (pairs ? 2 : 0) | (small ? 4 : 0);
}

void test_loads() {
  std::vector<std::uint32_t> values(128);
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<std::uint32_t>(i) * 2654435761u;
  }
  Managed<std::uint32_t> in(values), out(32);
  load_by_caches<<<1, 32>>>(in.device, out.device);
  must(cudaGetLastError());
  std::uint32_t all = 7;
  for (const std::uint32_t each : out.read()) all &= each;
  verdict("16 bytes past and through L1", (all & 1) != 0);
  verdict("8 bytes, volatile, of global and of shared memory", (all & 2) != 0);
  verdict("a word and a byte through L1", (all & 4) != 0);
}

__global__ void add_up(float* sums) {
  const auto i = static_cast<float>(threadIdx.x);
  reduce_add(sums + 4 * threadIdx.x, float4{i, 1, 2, 3});
}

void test_reduce() {
  Managed<float> sums(std::vector<float>(256, 5.0f));
  add_up<<<3, 64>>>(sums.device);
  must(cudaGetLastError());
  const auto& got = sums.read();
  bool good = true;
  for (int i = 0; i < 256; ++i) {
    good = good && got[static_cast<std::size_t>(i)] ==
                       5 + 3 * static_cast<float>(i % 4 == 0 ? i / 4 : i % 4);
  }
  verdict("four floats are added to, by three blocks", good);
}

// A warp copies 32 pieces; the barrier of the first half waits for them beside one arrival, that of
// the second takes them for the arrivals.
__global__ void copy_pieces(const uint4* in, uint4* out) {
  __shared__ uint4 pieces[64];
  __shared__ std::uint64_t beside, instead;
  const int lane = static_cast<int>(threadIdx.x);
  if (lane == 0) {
    mbarrier_init(&beside, 1);
    mbarrier_init(&instead, 32);
    fence_mbarrier_init();
  }
  __syncwarp();
  cp_async_16(&pieces[lane], in + lane);
  mbarrier_await_copies(&beside);
  __syncwarp();
  if (lane == 0) mbarrier_arrive(&beside);
  cp_async_16(&pieces[32 + lane], in + 32 + lane);
  mbarrier_arrive_after_copies(&instead);
  mbarrier_wait(&beside, 0);
  out[lane] = pieces[lane ^ 1];  // another lane's
  mbarrier_wait(&instead, 0);
  out[32 + lane] = pieces[32 + (lane ^ 1)];
}

void test_copies() {
  std::vector<std::uint32_t> values(256);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<std::uint32_t>(i);
  Managed<std::uint32_t> in(values), out(256);
  copy_pieces<<<1, 32>>>(reinterpret_cast<const uint4*>(in.device),
                         reinterpret_cast<uint4*>(out.device));
  must(cudaGetLastError());
  const auto& got = out.read();
  bool beside = true, instead = true;
  for (std::size_t i = 0; i < 256; ++i) (i < 128 ? beside : instead) &= got[i] == (i ^ 4);
  verdict("a barrier waits for copies beside its arrivals", beside);
  verdict("a copy's end is an arrival", instead);
}

__global__ void __cluster_dims__(4) read_neighbours(std::uint32_t* out) {
  __shared__ std::uint32_t mine[32];
  const std::uint32_t rank = cluster_rank();
  mine[threadIdx.x] = 100 * rank + threadIdx.x;
  cluster_sync();
  const std::uint32_t next = (rank + 1) % cluster_size();
  out[32 * blockIdx.x + threadIdx.x] = *in_block(&mine[threadIdx.x], next);
  cluster_sync();  // whose memory is read stays until then
}

void test_cluster() {
  Managed<std::uint32_t> out(8 * 32);
  read_neighbours<<<8, 32>>>(out.device);
  must(cudaGetLastError());
  const auto& got = out.read();
  bool good = true;
  for (std::uint32_t i = 0; i < 8 * 32; ++i) {
    good = good && got[i] == 100 * ((i / 32 + 1) % 4) + i % 32;
  }
  verdict("cluster: its size, and the next block's shared memory", good);
}

}  // namespace
}  // namespace infllm::cuda::tile

int main() {
  using namespace infllm::cuda::tile;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  test_words();
  test_loads();
  test_reduce();
  test_copies();
  test_cluster();
  return finish();
}
