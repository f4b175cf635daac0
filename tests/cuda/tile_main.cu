// SPDX-License-Identifier: Apache-2.0
//
// Wrappers of infllm/backend/cuda/tile on the card (sm_90a), products apart: a small program, so
// that a wrapper that is wrong shows here and not inside a kernel. Exit status 1 on a failure.
#include <cmath>

#include "infllm/backend/cuda/tile/control.cuh"
#include "infllm/backend/cuda/tile/mma.cuh"
#include "infllm/backend/cuda/tile/tma.cuh"
#include "tests/cuda/tile_check.cuh"

namespace infllm::cuda::tile {
namespace {

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
  return finish();
}
