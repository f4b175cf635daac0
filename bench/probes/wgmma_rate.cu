// SPDX-License-Identifier: Apache-2.0
//
// wgmma's rate by width and by where operand a comes from, operands resident: bf16 in, fp32 out,
// one and two warpgroups a thread block, one thread block an SM.
#include <cstring>

#include "bench/probes/probe.cuh"
#include "infllm/backend/cuda/tile/wgmma.cuh"

namespace infllm::probes {
namespace {

using namespace infllm::cuda::tile;

constexpr int kRounds = 4000;
constexpr int kSteps = 8;  // products of a round: a depth of 128
constexpr int kShared = 2 * 16384 + 65536 + 1024;

template <int N, bool kRegisters>
__global__ void __launch_bounds__(256, 1) multiply(const unsigned* numbers, float* out) {
  extern __shared__ std::byte memory[];
  std::byte* base = memory + (1024 - shared_address(memory) % 1024) % 1024;
  for (int i = static_cast<int>(threadIdx.x); i < (kShared - 1024) / 4; i += blockDim.x) {
    reinterpret_cast<unsigned*>(base)[i] = numbers[i];
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const std::uint64_t a = smem_desc_k_major(base + threadIdx.x / 128 * 16384);
  const std::uint64_t b = smem_desc_k_major(base + 32768);
  std::uint32_t registers[kSteps][4];
  for (int k = 0; k < kSteps; ++k) {
    for (int i = 0; i < 4; ++i) registers[k][i] = numbers[threadIdx.x * 32 + k * 4 + i];
  }
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i) d[i] = 0;
  for (int round = 0; round < kRounds; ++round) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const std::uint64_t at = b + k / 4 * (N * 128 / 16) + k % 4 * kStepKMajor;
      if constexpr (kRegisters) {
        Wgmma<__nv_bfloat16, N, Major::kK>::rs(d, registers[k][0], registers[k][1], registers[k][2],
                                               registers[k][3], at, 1);
      } else {
        Wgmma<__nv_bfloat16, N, Major::kK>::ss(d, a + k / 4 * 512 + k % 4 * kStepKMajor, at, 1);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(d);
  }
  float sum = 0;
  for (int i = 0; i < N / 2; ++i) sum += d[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

template <int N, bool kRegisters>
void measure(const unsigned* numbers, float* out) {
  const auto kernel = multiply<N, kRegisters>;
  must(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  for (const int groups : {1, 2}) {
    const double ms =
        median_ms([&] { kernel<<<sm_count(), groups * 128, kShared>>>(numbers, out); });
    const double flops = 2.0 * 64 * N * 16 * kSteps * kRounds * groups * sm_count();
    std::printf(
        "{\"name\":\"probe.wgmma\",\"n\":%d,\"a\":\"%s\",\"warpgroups\":%d,\"ms\":%.3f,\"tflops\":%"
        ".0f}\n",
        N, kRegisters ? "registers" : "shared", groups, ms, flops / ms * 1e-9);
  }
}

template <int N>
void measure_both(const unsigned* numbers, float* out) {
  measure<N, false>(numbers, out);
  measure<N, true>(numbers, out);
}

void run() {
  unsigned* numbers = nullptr;
  float* out = nullptr;
  must(cudaMalloc(&numbers, kShared));
  must(cudaMalloc(&out, sizeof(float) * 256 * static_cast<std::size_t>(sm_count())));
  fill_random<<<64, 256>>>(numbers, kShared / 4);
  measure_both<16>(numbers, out);
  measure_both<32>(numbers, out);
  measure_both<64>(numbers, out);
  measure_both<128>(numbers, out);
  measure_both<256>(numbers, out);
}

}  // namespace
}  // namespace infllm::probes

int main() { infllm::probes::run(); }
