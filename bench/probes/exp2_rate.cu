// SPDX-License-Identifier: Apache-2.0
//
// Exponentials of an SM per clock: ex2.approx alone, with the multiply-add before it, with the
// packing to bf16 behind it, and a cubic polynomial on the FMA units instead (a share of the
// elements may go that way when the special function unit is the limit).
#include "bench/probes/probe.cuh"
#include "infllm/backend/cuda/tile/control.cuh"

namespace infllm::probes {
namespace {

using namespace infllm::cuda::tile;

constexpr int kRounds = 20000;
constexpr int kWidth = 16;

enum class Mode { kExp2, kScaled, kPacked, kPolynomial };

// 2^x for x <= 0: 2^floor(x) by the exponent, a cubic for the rest (relative error 9e-5).
__device__ __forceinline__ float cubic_exp2(float x) {
  const float whole = floorf(x);
  const float rest = x - whole;
  const float power = fmaf(fmaf(fmaf(0.0777f, rest, 0.2262f), rest, 0.6958f), rest, 1.0f);
  return __int_as_float(__float_as_int(power) + (static_cast<int>(whole) << 23));
}

template <Mode kMode>
__global__ void __launch_bounds__(512)
    exponentials(float scale, float shift, float* out, long long* clocks) {
  float x[kWidth];
  for (int i = 0; i < kWidth; ++i) x[i] = -0.01f * static_cast<float>(threadIdx.x + i);
  const long long begin = clock64();
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if constexpr (kMode == Mode::kPolynomial) {
        x[i] = cubic_exp2(fmaf(x[i], scale, shift));
      } else if constexpr (kMode == Mode::kExp2) {
        x[i] = fast_exp2(x[i]);
      } else {
        x[i] = fast_exp2(fmaf(x[i], scale, shift));
      }
    }
    if constexpr (kMode == Mode::kPacked) {
#pragma unroll
      for (int i = 0; i < kWidth; i += 2) {
        x[i] = __int_as_float(static_cast<int>(pack2<__nv_bfloat16>(x[i], x[i + 1])) & 0xffff0000);
      }
    }
  }
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - begin;
  float sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += x[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

template <Mode kMode>
void measure(const char* what, float* out, long long* clocks) {
  const double ms =
      median_ms([&] { exponentials<kMode><<<sm_count(), 512>>>(-0.7f, -0.3f, out, clocks); });
  long long taken = 0;
  must(cudaMemcpy(&taken, clocks, sizeof(taken), cudaMemcpyDeviceToHost));
  std::printf("{\"name\":\"probe.exp2\",\"mode\":\"%s\",\"ms\":%.3f,\"per_clock_and_sm\":%.2f}\n",
              what, ms, 512.0 * kWidth * kRounds / static_cast<double>(taken));
}

void run() {
  float* out = nullptr;
  long long* clocks = nullptr;
  must(cudaMalloc(&out, sizeof(float) * 512 * static_cast<std::size_t>(sm_count())));
  must(cudaMalloc(&clocks, sizeof(long long) * static_cast<std::size_t>(sm_count())));
  measure<Mode::kExp2>("ex2", out, clocks);
  measure<Mode::kScaled>("fma, ex2", out, clocks);
  measure<Mode::kPacked>("fma, ex2, half of it packed", out, clocks);
  measure<Mode::kPolynomial>("fma, cubic", out, clocks);
}

}  // namespace
}  // namespace infllm::probes

int main() { infllm::probes::run(); }
