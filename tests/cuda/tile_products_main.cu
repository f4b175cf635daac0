// SPDX-License-Identifier: Apache-2.0
//
// The products of infllm/backend/cuda/tile on the card (sm_90a): wgmma in its widths and layouts,
// mma.sync, and what feeds them. Exit status 1 on a failure. Products are of small whole numbers:
// exact in every type, in any order.
#include "infllm/backend/cuda/tile/mma.cuh"
#include "infllm/backend/cuda/tile/tma.cuh"
#include "infllm/backend/cuda/tile/wgmma.cuh"
#include "tests/cuda/tile_check.cuh"

namespace infllm::cuda::tile {
namespace {

// d[64, N] = a[64, K] b: through TMA into swizzled panels, in the forms ss and rs, b K-major
// ([N][K] in memory) or MN-major ([K][N]).
constexpr int kDepth = 128;

template <typename T, int N, Major kMajor, bool kRegisters>
__global__ void __launch_bounds__(128)
    product(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
            float* out) {
  extern __shared__ std::byte memory[];
  std::byte* base = memory + (1024 - shared_address(memory) % 1024) % 1024;
  std::byte* a = base;                 // [2 panels][64 rows]
  std::byte* b = base + 2 * 64 * 128;  // K-major [2 panels][N rows], MN-major [N / 64 panels][128]
  constexpr int kBPanels = kMajor == Major::kK ? 2 : N / 64;
  constexpr int kBRows = kMajor == Major::kK ? N : kDepth;
  __shared__ std::uint64_t full;
  if (threadIdx.x == 0) {
    mbarrier_init(&full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(&full, 2 * 64 * 128 + kBPanels * kBRows * 128);
    for (int p = 0; p < 2; ++p) tma_load_2d(&a_map, &full, a + p * 8192, 64 * p, 0);
    for (int p = 0; p < kBPanels; ++p) {
      tma_load_2d(&b_map, &full, b + p * kBRows * 128, 64 * p, 0);
    }
  }
  __syncthreads();
  mbarrier_wait(&full, 0);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i) d[i] = -1e30f;  // the first product must not add to it
  const std::uint64_t a_desc = smem_desc_k_major(a);
  const std::uint64_t b_desc =
      kMajor == Major::kK ? smem_desc_k_major(b) : smem_desc_mn_major(b, kBRows * 128);
  std::uint32_t registers[kDepth / 16][4];
  if constexpr (kRegisters) {
    // Row r of a panel: 16-byte unit u lies at place u ^ (r % 8).
    for (int k = 0; k < kDepth / 16; ++k) {
      const int row = warp * 16 + lane % 16;
      const int unit = k % 4 * 2 + lane / 16;
      ldmatrix_x4(registers[k], a + k / 4 * 8192 + row * 128 + (unit ^ row % 8) * 16);
    }
  }
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    const std::uint64_t b_at = kMajor == Major::kK
                                   ? b_desc + k / 4 * (kBRows * 128 / 16) + k % 4 * kStepKMajor
                                   : b_desc + k * kStepMnMajor;
    if constexpr (kRegisters) {
      Wgmma<T, N, kMajor>::rs(d, registers[k][0], registers[k][1], registers[k][2], registers[k][3],
                              b_at, k != 0);
    } else {
      Wgmma<T, N, kMajor>::ss(d, a_desc + k / 4 * (8192 / 16) + k % 4 * kStepKMajor, b_at, k != 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(d);
  for (int i = 0; i < N / 2; ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
    out[row * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
  }
}

template <typename T, int N, Major kMajor, bool kRegisters>
void test_product(const char* type) {
  const auto a = small_numbers<T>(64 * kDepth, 1);
  const auto b = small_numbers<T>(N * kDepth, 2);
  Managed<T> a_memory(a), b_memory(b);
  Managed<float> out(64 * N);
  const CUtensorMap a_map = map_of({.data = a_memory.device,
                                    .dtype = dtype_of<T>(),
                                    .rank = 2,
                                    .size = {kDepth, 64},
                                    .stride_bytes = {2 * kDepth},
                                    .box = {64, 64}});
  const bool k_major = kMajor == Major::kK;
  const CUtensorMap b_map = map_of({.data = b_memory.device,
                                    .dtype = dtype_of<T>(),
                                    .rank = 2,
                                    .size = {k_major ? kDepth : N, k_major ? N : kDepth},
                                    .stride_bytes = {2ull * (k_major ? kDepth : N)},
                                    .box = {64, k_major ? N : kDepth}});
  constexpr int kShared = 2 * 64 * 128 + N * kDepth * 2 + 1024;
  const auto kernel = product<T, N, kMajor, kRegisters>;
  must(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  kernel<<<1, 128, kShared>>>(a_map, b_map, out.device);
  must(cudaGetLastError());
  const auto& got = out.read();
  bool good = true;
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < N; ++n) {
      float sum = 0;
      for (int k = 0; k < kDepth; ++k) {
        sum += static_cast<float>(a[m * kDepth + k]) *
               static_cast<float>(b[k_major ? n * kDepth + k : k * N + n]);
      }
      good = good && got[m * N + n] == sum;
    }
  }
  verdict(std::string("wgmma m64n") + std::to_string(N) + "k16 " + type +
              (kRegisters ? " rs" : " ss") + (k_major ? ", b K-major" : ", b MN-major"),
          good);
}

template <typename T>
void test_products(const char* type) {
  test_product<T, 16, Major::kK, false>(type);
  test_product<T, 16, Major::kK, true>(type);
  test_product<T, 32, Major::kK, false>(type);
  test_product<T, 64, Major::kK, false>(type);
  test_product<T, 64, Major::kK, true>(type);
  test_product<T, 64, Major::kMN, true>(type);
  test_product<T, 128, Major::kK, false>(type);
  test_product<T, 128, Major::kMN, false>(type);
  test_product<T, 128, Major::kMN, true>(type);
  test_product<T, 256, Major::kK, false>(type);
}

template <typename T>
__global__ void small_product(const T* a, const T* b, float* out) {
  // a [16][16], b [8][16] (its columns), through ldmatrix; out [16][8].
  __shared__ __align__(16) T shared_a[16 * 16];
  __shared__ __align__(16) T shared_b[16 * 16];
  const int lane = static_cast<int>(threadIdx.x);
  cp_async_16(shared_a + lane * 8, a + lane * 8);
  cp_async_16(shared_b + lane * 8, b + lane % 16 * 8, lane < 16);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  std::uint32_t ra[4], rb[4];
  ldmatrix_x4(ra, shared_a + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_x4(rb, shared_b + lane % 8 * 16 + lane / 8 % 2 * 8);
  float d[4] = {0, 0, 0, 0};
  mma_m16n8k16<T>(d, ra, {rb[0], rb[1]});
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
  // Zeros where a copy was not valid.
  if (lane >= 16) {
    for (int i = 0; i < 8; ++i)
      out[128 + (lane - 16) * 8 + i] = static_cast<float>(shared_b[lane * 8 + i]);
  }
}

template <typename T>
void test_small_product(const char* type) {
  const auto a = small_numbers<T>(256, 3);
  const auto b = small_numbers<T>(128, 4);
  Managed<T> a_memory(a), b_memory(b);
  Managed<float> out(256);
  small_product<T><<<1, 32>>>(a_memory.device, b_memory.device, out.device);
  const auto& got = out.read();
  bool good = true;
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      float sum = 0;
      for (int k = 0; k < 16; ++k)
        sum += static_cast<float>(a[m * 16 + k]) * static_cast<float>(b[n * 16 + k]);
      good = good && got[m * 8 + n] == sum;
    }
  }
  verdict(std::string("mma m16n8k16 ") + type + ", ldmatrix, cp.async", good);
  bool zeros = true;
  for (int i = 128; i < 256; ++i) zeros = zeros && got[i] == 0;
  verdict("cp.async that is not valid writes zeros", zeros);
}

}  // namespace
}  // namespace infllm::cuda::tile

int main() {
  using namespace infllm::cuda::tile;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  test_products<__nv_bfloat16>("bf16");
  test_products<__half>("f16");
  test_small_product<__nv_bfloat16>("bf16");
  test_small_product<__half>("f16");
  return finish();
}
