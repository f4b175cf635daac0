// SPDX-License-Identifier: Apache-2.0
//
// Hopper's warpgroup matrix instruction (sm_90a): d[64, N] (+)= a[64, 16] b[16, N], issued by 128
// threads, with b in shared memory, a in shared memory (ss) or registers (rs), d in registers.
//
//   wgmma_fence();                                       before the first use of d and a registers
//   for (k16 ...) Wgmma<T, 64, Major::kK>::ss(s, q_desc + k16, k_desc + k16, k16 != 0);
//   wgmma_commit();
//   wgmma_wait<0>();                                     then d may be read
//
// Registers: warp w of the group holds rows 16 w .. 16 w + 15; within it, d is a row of m16n8
// fragments of mma.cuh: d[4 i .. 4 i + 3] covers columns 8 i .. 8 i + 7. a of rs is mma.cuh's a.
//
// Shared operands lie in panels of 64 elements (128 bytes) by 8 n rows, 1024-byte aligned, with the
// 128-byte swizzle that a tensor map makes. K-major: the panel's rows are rows of M or N, and 16 k
// are 32 bytes along the row. MN-major: the panel's rows are k, and 16 k are 16 rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "infllm/backend/cuda/tile/barrier.cuh"

namespace infllm::cuda::tile {

enum class Major : int { kK = 0, kMN = 1 };

// Descriptors count in units of 16 bytes: add kStepK per 16 of k within a panel.
inline constexpr std::uint64_t kStepKMajor = 32 / 16;
inline constexpr std::uint64_t kStepMnMajor = 16 * 128 / 16;

// Bits: 0-13 address, 16-29 leading byte offset, 32-45 stride byte offset, 62-63 swizzle (1: 128).
__device__ __forceinline__ std::uint64_t smem_desc(const void* panel, std::uint32_t leading_bytes,
                                                   std::uint32_t stride_bytes) {
  return static_cast<std::uint64_t>((shared_address(panel) & 0x3FFFF) >> 4) |
         static_cast<std::uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<std::uint64_t>(stride_bytes >> 4) << 32 | std::uint64_t{1} << 62;
}

// Groups of 8 rows follow each other, 1024 bytes apart.
__device__ __forceinline__ std::uint64_t smem_desc_k_major(const void* panel) {
  return smem_desc(panel, 16, 1024);
}

// Panels (64 of M or N each) are panel_bytes apart: 8192 for panels of 64 rows.
__device__ __forceinline__ std::uint64_t smem_desc_mn_major(const void* panel,
                                                            std::uint32_t panel_bytes = 8192) {
  return smem_desc(panel, panel_bytes, 1024);
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most N committed groups run.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving uses of d over this point; it does not see the asynchrony.
template <int kCount>
__device__ __forceinline__ void wgmma_pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <typename T, int N, Major kMajorB, Major kMajorA = Major::kK>
struct Wgmma;

// Operand lists: %0 .. of the accumulators, and the array elements they stand for.
#define INFLLM_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define INFLLM_R16 INFLLM_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define INFLLM_R32                                                                \
  INFLLM_R16                                                                      \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, " \
  "%31"
#define INFLLM_R64                                                                   \
  INFLLM_R32                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "    \
  "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, " \
  "%63"
#define INFLLM_R128                                                                  \
  INFLLM_R64                                                                         \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, "    \
  "%79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, " \
  "%95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, "  \
  "%109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, "   \
  "%122, %123, %124, %125, %126, %127"
#define INFLLM_D8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define INFLLM_D16(i) INFLLM_D8(i), INFLLM_D8(i + 8)
#define INFLLM_D32(i) INFLLM_D16(i), INFLLM_D16(i + 16)
#define INFLLM_D64(i) INFLLM_D32(i), INFLLM_D32(i + 32)
#define INFLLM_D128(i) INFLLM_D64(i), INFLLM_D64(i + 64)

// The operands behind the COUNT accumulators have the numbers P0 = COUNT, P1 = COUNT + 1, ...
#define INFLLM_WGMMA(TYPE, NAME, N, COUNT, P0, P1, P2, P3, P4, P5, P6)                             \
  template <Major kMajorB, Major kMajorA>                                                          \
  struct Wgmma<TYPE, N, kMajorB, kMajorA> {                                                        \
    static __device__ __forceinline__ void ss(float (&d)[COUNT], std::uint64_t a, std::uint64_t b, \
                                              int add) {                                           \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P2                                        \
                   ", 0;\n"                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME                 \
                   " {" INFLLM_R##COUNT "}, %" #P0 ", %" #P1 ", p, 1, 1, %" #P3 ", %" #P4 ";\n}\n" \
                   : INFLLM_D##COUNT(0)                                                            \
                   : "l"(a), "l"(b), "r"(add), "n"(static_cast<int>(kMajorA)),                     \
                     "n"(static_cast<int>(kMajorB)));                                              \
    }                                                                                              \
    static __device__ __forceinline__ void rs(float (&d)[COUNT], std::uint32_t a0,                 \
                                              std::uint32_t a1, std::uint32_t a2,                  \
                                              std::uint32_t a3, std::uint64_t b, int add) {        \
      asm volatile(                                                                                \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %" #P5                                                 \
          ", 0;\n"                                                                                 \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" INFLLM_R##COUNT     \
          "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1, %" #P6 ";\n}\n"         \
          : INFLLM_D##COUNT(0)                                                                     \
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(add), "n"(static_cast<int>(kMajorB))); \
    }                                                                                              \
  };
#define INFLLM_WGMMA_SIZES(TYPE, NAME)                          \
  INFLLM_WGMMA(TYPE, NAME, 16, 8, 8, 9, 10, 11, 12, 13, 14)     \
  INFLLM_WGMMA(TYPE, NAME, 32, 16, 16, 17, 18, 19, 20, 21, 22)  \
  INFLLM_WGMMA(TYPE, NAME, 64, 32, 32, 33, 34, 35, 36, 37, 38)  \
  INFLLM_WGMMA(TYPE, NAME, 128, 64, 64, 65, 66, 67, 68, 69, 70) \
  INFLLM_WGMMA(TYPE, NAME, 256, 128, 128, 129, 130, 131, 132, 133, 134)

INFLLM_WGMMA_SIZES(__nv_bfloat16, "bf16")
INFLLM_WGMMA_SIZES(__half, "f16")

#undef INFLLM_WGMMA_SIZES
#undef INFLLM_WGMMA
#undef INFLLM_D128
#undef INFLLM_D64
#undef INFLLM_D32
#undef INFLLM_D16
#undef INFLLM_D8
#undef INFLLM_R128
#undef INFLLM_R64
#undef INFLLM_R32
#undef INFLLM_R16
#undef INFLLM_R8

}  // namespace infllm::cuda::tile
