// SPDX-License-Identifier: Apache-2.0
//
// Every wrapper of infllm/backend/cuda/tile on the card (sm_90a): a small program, so that a layout
// or a descriptor that is wrong shows here and not inside a kernel. Exit status 1 on a failure.
//
// Products are of small whole numbers: exact in every type, in any order.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "infllm/backend/cuda/tile/control.cuh"
#include "infllm/backend/cuda/tile/mma.cuh"
#include "infllm/backend/cuda/tile/tensor_map.h"
#include "infllm/backend/cuda/tile/tma.cuh"
#include "infllm/backend/cuda/tile/wgmma.cuh"

namespace infllm::cuda::tile {
namespace {

int failures = 0;

void verdict(const std::string& what, bool good) {
  std::printf("%s %s\n", good ? "ok  " : "FAIL", what.c_str());
  if (!good) ++failures;
}

void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA: %s\n", cudaGetErrorString(error));
  std::exit(2);
}

template <typename T>
struct Managed {  // device memory with a host copy
  explicit Managed(std::size_t count) : host(count) {
    must(cudaMalloc(&device, count * sizeof(T)));
    must(cudaMemset(device, 0xff, count * sizeof(T)));
  }
  explicit Managed(const std::vector<T>& values) : Managed(values.size()) {
    host = values;
    must(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  Managed(const Managed&) = delete;
  ~Managed() { cudaFree(device); }
  const std::vector<T>& read() {
    must(cudaDeviceSynchronize());
    must(cudaMemcpy(host.data(), device, host.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
  T* device = nullptr;
  std::vector<T> host;
};

template <typename T>
std::vector<T> small_numbers(std::size_t count, unsigned seed) {
  std::vector<T> values(count);
  for (std::size_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    values[i] = T(static_cast<float>(static_cast<int>(seed >> 24) % 9 - 4));
  }
  return values;
}

template <typename T>
constexpr DType dtype_of() {
  return std::is_same_v<T, __half> ? DType::kF16 : DType::kBF16;
}

CUtensorMap map_of(const TensorMapSpec& spec) {
  Result<CUtensorMap> map = make_tensor_map(spec);
  if (!map.ok()) {
    std::printf("%s\n", map.status().message().c_str());
    std::exit(2);
  }
  return *map;
}

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

// ldmatrix_x4_trans is the transposed ldmatrix_x4, stmatrix_x4 the inverse of ldmatrix_x4.
__global__ void matrices(std::uint16_t* out) {
  __shared__ __align__(16) std::uint16_t in[32 * 8];
  __shared__ __align__(16) std::uint16_t back[32 * 8];
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) in[lane * 8 + i] = static_cast<std::uint16_t>(lane * 8 + i);
  __syncwarp();
  std::uint32_t r[4], t[4];
  ldmatrix_x4(r, in + lane * 8);
  ldmatrix_x4_trans(t, in + lane * 8);
  stmatrix_x4(back + lane * 8, r);
  __syncwarp();
  for (int i = 0; i < 8; ++i) out[lane * 8 + i] = back[lane * 8 + i];
  for (int i = 0; i < 4; ++i) {
    // Matrix i transposed: row lane / 4, columns 2 (lane % 4) ..
    out[256 + i * 64 + lane / 4 * 8 + lane % 4 * 2] = static_cast<std::uint16_t>(t[i]);
    out[256 + i * 64 + lane / 4 * 8 + lane % 4 * 2 + 1] = static_cast<std::uint16_t>(t[i] >> 16);
  }
}

void test_matrices() {
  Managed<std::uint16_t> out(512);
  matrices<<<1, 32>>>(out.device);
  const auto& got = out.read();
  bool inverse = true, transposed = true;
  for (int i = 0; i < 256; ++i) {
    inverse = inverse && got[i] == i;
    transposed = transposed && got[256 + i] == i / 64 * 64 + i % 8 * 8 + i / 8 % 8;
  }
  verdict("stmatrix puts back what ldmatrix took", inverse);
  verdict("ldmatrix.trans", transposed);
}

// Boxes of rank 3, 4 and 5, unswizzled, that begin before and end behind the array.
template <int kRank>
__global__ void load_box(const __grid_constant__ CUtensorMap map, float* out, int count,
                         int first) {
  __shared__ __align__(128) float box[512];
  __shared__ std::uint64_t full;
  if (threadIdx.x == 0) {
    tma_prefetch_map(&map);
    mbarrier_init(&full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(&full, static_cast<std::uint32_t>(count) * 4);
    if constexpr (kRank == 3) tma_load_3d(&map, &full, box, 0, first, 0);
    if constexpr (kRank == 4) tma_load_4d(&map, &full, box, 0, first, 0, 1, CacheHint::kEvictFirst);
    if constexpr (kRank == 5)
      tma_load_5d(&map, &full, box, 0, first, 0, 1, 1, CacheHint::kEvictLast);
  }
  __syncthreads();
  mbarrier_wait(&full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += blockDim.x) out[i] = box[i];
}

template <int kRank>
void test_box() {
  // size {4, 5, 3, 2, 2}; the box takes all of dimension 0, 4 of 1, 2 of 2, 1 of the others.
  constexpr int kSize[5] = {4, 5, 3, 2, 2};
  std::vector<float> values(4 * 5 * 3 * 2 * 2);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i + 1);
  Managed<float> memory(values);
  TensorMapSpec spec{.data = memory.device,
                     .dtype = DType::kF32,
                     .rank = kRank,
                     .box = {4, 4, 2, 1, 1},
                     .swizzle = false};
  std::uint64_t stride = 4;
  for (int i = 0; i < kRank; ++i) {
    spec.size[i] = static_cast<std::uint64_t>(kSize[i]);
    stride *= spec.size[i];
    if (i + 1 < kRank) spec.stride_bytes[i] = stride;
  }
  bool good = true;
  for (const int first : {-2, 0, 3}) {
    Managed<float> out(32);
    load_box<kRank><<<1, 64>>>(map_of(spec), out.device, 32, first);
    must(cudaGetLastError());
    const auto& got = out.read();
    for (int i = 0; i < 32; ++i) {
      const int c1 = first + i / 4 % 4, c2 = i / 16;
      const int c3 = kRank >= 4, c4 = kRank >= 5;
      const float want =
          c1 < 0 || c1 >= 5
              ? 0
              : values[static_cast<std::size_t>((((c4 * 2 + c3) * 3 + c2) * 5 + c1) * 4 + i % 4)];
      good = good && got[i] == want;
    }
  }
  verdict("tma load of rank " + std::to_string(kRank) + ", zeros outside the array", good);
}

__global__ void bulk(const float* in, float* copied, float* sums) {
  __shared__ __align__(128) float box[256];
  __shared__ std::uint64_t full;
  if (threadIdx.x == 0) {
    mbarrier_init(&full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(&full, sizeof(box));
    tma_load_1d(&full, box, in, sizeof(box));
  }
  __syncthreads();
  mbarrier_wait(&full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += blockDim.x) box[i] += 1;
  fence_async_proxy();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store_1d(copied, box, sizeof(box));
    tma_reduce_add_1d(sums, box, sizeof(box));
    tma_commit();
    tma_wait_read<0>();
    tma_wait<0>();
  }
}

__global__ void store_box(const __grid_constant__ CUtensorMap map) {
  __shared__ __align__(128) float box[32];
  if (threadIdx.x < 32) box[threadIdx.x] = static_cast<float>(threadIdx.x) + 100;
  fence_async_proxy();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store_3d(&map, box, 0, 3, 1);
    tma_commit();
    tma_wait<0>();
  }
}

void test_bulk() {
  std::vector<float> values(256);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  Managed<float> in(values), copied(256), sums(std::vector<float>(256, 5.0f));
  bulk<<<3, 64>>>(in.device, copied.device, sums.device);
  const auto& stored = copied.read();
  const auto& added = sums.read();
  bool same = true, sum = true;
  for (int i = 0; i < 256; ++i) {
    same = same && stored[i] == static_cast<float>(i + 1);
    sum = sum && added[i] == 5 + 3 * static_cast<float>(i + 1);
  }
  verdict("tma load and store of bytes", same);
  verdict("tma reduce: three blocks add up", sum);

  Managed<float> array(std::vector<float>(60, -1.0f));  // {4, 5, 3}
  const CUtensorMap map = map_of({.data = array.device,
                                  .dtype = DType::kF32,
                                  .rank = 3,
                                  .size = {4, 5, 3},
                                  .stride_bytes = {16, 80},
                                  .box = {4, 4, 2},
                                  .swizzle = false});
  store_box<<<1, 32>>>(map);
  const auto& got = array.read();
  bool good = true;
  for (int i = 0; i < 60; ++i) {
    const int c1 = i / 4 % 5, c2 = i / 20;
    const float want =
        c1 >= 3 && c2 >= 1 ? static_cast<float>(((c2 - 1) * 4 + c1 - 3) * 4 + i % 4 + 100) : -1;
    good = good && got[i] == want;
  }
  verdict("tma store of rank 3 leaves alone what is outside", good);
}

// Two blocks of a cluster: block 0 multicasts a plane into both and each tells the other's barrier.
__global__ void __cluster_dims__(2) share(const __grid_constant__ CUtensorMap map, float* out) {
  __shared__ __align__(128) float box[32];
  __shared__ std::uint64_t full, heard;
  const std::uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    mbarrier_init(&full, 1);
    mbarrier_init(&heard, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(&full, sizeof(box));
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    if (rank == 0) tma_load_5d_multicast(&map, &full, box, 0, 0, 0, 0, 0, 3);
    mbarrier_arrive_remote(&heard, rank ^ 1);
  }
  mbarrier_wait(&full, 0);
  mbarrier_wait(&heard, 0);
  out[rank * 32 + threadIdx.x] = box[threadIdx.x];
  cluster_sync();
}

void test_cluster() {
  std::vector<float> values(32);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  Managed<float> in(values), out(64);
  const CUtensorMap map = map_of({.data = in.device,
                                  .dtype = DType::kF32,
                                  .rank = 5,
                                  .size = {4, 8, 1, 1, 1},
                                  .stride_bytes = {16, 128, 128, 128},
                                  .box = {4, 8, 1, 1, 1},
                                  .swizzle = false});
  share<<<2, 32>>>(map, out.device);
  must(cudaGetLastError());
  const auto& got = out.read();
  bool good = true;
  for (int i = 0; i < 64; ++i) good = good && got[i] == static_cast<float>(i % 32);
  verdict("cluster: multicast, arrival at the other block's barrier", good);
}

// A producer warpgroup hands numbers through a ring of two to a consumer one, which hands back a
// named barrier; registers change hands; one elected lane counts.
__global__ void __launch_bounds__(256, 1) hand_over(int rounds, int* out) {
  __shared__ int slot[2];
  __shared__ std::uint64_t full[2], empty[2];
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], 128);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (warp_index() < 4) {
    setmaxnreg_dec<24>();
    if (warp_index() == 0) {
      for (int n = 0; n < rounds; ++n) {
        mbarrier_wait(&empty[n % 2], (n / 2 & 1) ^ 1);
        if (elect_one()) {
          slot[n % 2] = n;
          mbarrier_arrive(&full[n % 2]);
        }
      }
    }
    named_barrier_sync(1, 256);
    if (threadIdx.x == 0) out[1] = 1;
  } else {
    setmaxnreg_inc<240>();
    int sum = 0;
    for (int n = 0; n < rounds; ++n) {
      mbarrier_wait(&full[n % 2], n / 2 & 1);
      sum += slot[n % 2];
      mbarrier_arrive(&empty[n % 2]);
    }
    atomicAdd(out, sum);
    named_barrier_arrive(1, 256);
  }
}

void test_hand_over() {
  Managed<int> out(std::vector<int>{0, 0});
  hand_over<<<1, 256>>>(1001, out.device);
  must(cudaGetLastError());
  const auto& got = out.read();
  verdict("mbarrier ring, setmaxnreg, elect", got[0] == 128 * (1000 * 1001 / 2));
  verdict("named barrier", got[1] == 1);
}

__global__ void convert(const float* in, float* exp2, std::uint32_t* packed,
                        std::uint32_t* packed_half, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  exp2[i] = fast_exp2(in[i]);
  packed[i] = pack2<__nv_bfloat16>(in[i], -in[i]);
  packed_half[i] = pack2<__half>(in[i], -in[i]);
}

void test_convert() {
  std::vector<float> values;
  for (int i = 0; i < 4000; ++i) values.push_back(-125.0f + static_cast<float>(i) * 0.0321f);
  values.push_back(-INFINITY);
  const int count = static_cast<int>(values.size());
  Managed<float> in(values), exp2(values.size());
  Managed<std::uint32_t> packed(values.size()), packed_half(values.size());
  convert<<<(count + 127) / 128, 128>>>(in.device, exp2.device, packed.device, packed_half.device,
                                        count);
  const auto& e = exp2.read();
  const auto& p = packed.read();
  const auto& h = packed_half.read();
  bool exponentials = e.back() == 0, pairs = true;
  for (int i = 0; i < count; ++i) {
    const double exact = std::exp2(static_cast<double>(values[i]));
    exponentials = exponentials && std::abs(e[i] - exact) <= exact * std::ldexp(1.0, -22);
    const auto bits = [](auto x) {
      return static_cast<std::uint32_t>(*reinterpret_cast<std::uint16_t*>(&x));
    };
    pairs = pairs && p[i] == (bits(__float2bfloat16_rn(values[i])) |
                              bits(__float2bfloat16_rn(-values[i])) << 16);
    pairs = pairs &&
            h[i] == (bits(__float2half_rn(values[i])) | bits(__float2half_rn(-values[i])) << 16);
  }
  verdict("fast_exp2 within 2^-22", exponentials);
  verdict("pack2 rounds to nearest even, lo first", pairs);
}

// The second kernel must see what the first wrote, although it may start before it ends.
__global__ void first_kernel(int* out) {
  pdl_launch();
  for (int i = 0; i < 2000; ++i) __nanosleep(100);
  out[threadIdx.x] = static_cast<int>(threadIdx.x);
}
__global__ void second_kernel(const int* in, int* out) {
  pdl_wait();
  out[threadIdx.x] = in[threadIdx.x] + 1;
}

void test_pdl() {
  Managed<int> a(64), b(64);
  first_kernel<<<1, 64>>>(a.device);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(64);
  config.attrs = &attribute;
  config.numAttrs = 1;
  must(cudaLaunchKernelEx(&config, second_kernel, static_cast<const int*>(a.device), b.device));
  const auto& got = b.read();
  bool good = true;
  for (int i = 0; i < 64; ++i) good = good && got[i] == i + 1;
  verdict("programmatic dependent launch", good);
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

void test_refusal() {
  Managed<float> memory(64);
  const Result<CUtensorMap> map = make_tensor_map({.data = memory.device,
                                                   .dtype = DType::kF32,
                                                   .rank = 2,
                                                   .size = {4, 4},
                                                   .stride_bytes = {20},
                                                   .box = {4, 4},
                                                   .swizzle = false});
  verdict("a stride that is no multiple of 16 is refused with its numbers",
          !map.ok() && map.status().message().find("strides [20]") != std::string::npos);
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
  test_matrices();
  test_box<3>();
  test_box<4>();
  test_box<5>();
  test_bulk();
  test_cluster();
  test_hand_over();
  test_convert();
  test_pdl();
  test_refusal();
  std::printf("%s\n", failures == 0 ? "all checks passed" : "CHECKS FAILED");
  return failures == 0 ? 0 : 1;
}
