// SPDX-License-Identifier: Apache-2.0
//
// y = alpha x W^T + beta y for one to four tokens. Each weight is read once and used for every
// token, so the time is that of reading W. A warp owns kRows rows of W and walks them 256 elements
// at a time; kUnroll steps are loaded before the first is used, and those of the first round before
// the kernel in front has finished, because nobody writes weights. x comes out of the L1 cache.
#include "infllm/backend/cuda/gemv.h"
#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/numbers.cuh"

namespace infllm::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kRows = 2;
constexpr int kUnroll = 4;
constexpr int kStep = 32 * kVector;  // elements that a warp reads of one row at a time

struct GemvShape {
  int outputs;
  int inputs;
  std::int64_t weight_stride;
  float alpha;
  float beta;
};

// Read once: past the L1 cache.
__device__ __forceinline__ uint4 load_weights(const void* from) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from));
  return v;
}

template <typename T, int kTokens>
__global__ void __launch_bounds__(kWarps * 32)
    gemv_kernel(GemvShape shape, const T* __restrict__ weight, const T* x, T* y) {
  start_next();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row =
      (static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32) * kRows;
  const int first = lane * kVector;
  const T* rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    // A row behind the last one is the last one again; its sum is not written.
    rows[r] = weight + min(row + r, shape.outputs - 1) * shape.weight_stride;
  }
  uint4 held[kUnroll][kRows];
  const auto fetch = [&](int column) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        held[u][r] = column + u * kStep < shape.inputs ? load_weights(rows[r] + column + u * kStep)
                                                       : uint4{};
      }
    }
  };
  fetch(first);
  wait_for_previous();

  float sums[kRows][kTokens] = {};
  for (int column = first; column < shape.inputs; column += kUnroll * kStep) {
    if (column != first) fetch(column);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (column + u * kStep >= shape.inputs) break;
      float w[kRows][kVector];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const auto& values = reinterpret_cast<const Vector<T>&>(held[u][r]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) w[r][i] = to_float(values.values[i]);
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        float v[kVector];
        load(x + std::int64_t{t} * shape.inputs + column + u * kStep, v);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) sums[r][t] = fmaf(w[r][i], v[i], sums[r][t]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float sum = sums[r][t];
#pragma unroll
      for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffff, sum, other);
      if (lane == r * kTokens + t && row + r < shape.outputs) {
        T* out = y + std::int64_t{t} * shape.outputs + row + r;
        *out = to<T>(shape.beta != 0 ? shape.alpha * sum + shape.beta * to_float(*out)
                                     : shape.alpha * sum);
      }
    }
  }
}

// A warp an element of y.
template <typename T>
__global__ void plain_product_kernel(Product p) {
  start_next();
  wait_for_previous();
  const std::int64_t element = (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (element >= p.tokens * p.outputs) return;
  const T* x = static_cast<const T*>(p.x) + element / p.outputs * p.inputs;
  const T* w = static_cast<const T*>(p.weight) + element % p.outputs * p.weight_stride;
  float sum = 0;
  for (std::int64_t i = threadIdx.x % 32; i < p.inputs; i += 32) {
    sum = fmaf(to_float(w[i]), to_float(x[i]), sum);
  }
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffff, sum, other);
  if (threadIdx.x % 32 != 0) return;
  T* out = static_cast<T*>(p.y) + element;
  *out = to<T>(p.beta != 0 ? p.alpha * sum + p.beta * to_float(*out) : p.alpha * sum);
}

template <typename From, typename To>
__global__ void convert_kernel(const From* values, std::int64_t rows, std::int64_t width,
                               std::int64_t stride, To* out) {
  start_next();
  wait_for_previous();
  const std::int64_t index = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= rows * stride) return;
  const std::int64_t column = index % stride;
  out[index] =
      column < width ? to<To>(to_float(values[index / stride * width + column])) : to<To>(0);
}

unsigned blocks_for(std::int64_t threads, int block) {
  return static_cast<unsigned>((threads + block - 1) / block);
}

}  // namespace

bool gemv_covers(const Product& p) {
  return p.tokens <= kGemvTokens && p.inputs % kVector == 0 && is_vector_aligned(p.x) &&
         is_vector_aligned(p.weight, p.weight_stride);
}

Status gemv(const Device& device, const Product& p) {
  return with_type(p.dtype, [&]<typename T>(T) {
    constexpr void (*kKernels[])(GemvShape, const T*, const T*, T*) = {
        gemv_kernel<T, 1>, gemv_kernel<T, 2>, gemv_kernel<T, 3>, gemv_kernel<T, 4>};
    const GemvShape shape{static_cast<int>(p.outputs), static_cast<int>(p.inputs), p.weight_stride,
                          p.alpha, p.beta};
    return launch(device, "linear", kKernels[p.tokens - 1], blocks_for(p.outputs, kWarps * kRows),
                  kWarps * 32, 0, shape, static_cast<const T*>(p.weight),
                  static_cast<const T*>(p.x), static_cast<T*>(p.y));
  });
}

Status plain_product(const Device& device, const Product& p) {
  constexpr int kThreads = 256;
  return with_type(p.dtype, [&]<typename T>(T) {
    return launch(device, "linear", plain_product_kernel<T>,
                  blocks_for(p.tokens * p.outputs * 32, kThreads), kThreads, 0, p);
  });
}

Status convert(const Device& device, DType from, const void* values, DType to_type,
               std::int64_t rows, std::int64_t width, std::int64_t stride, void* out) {
  constexpr int kThreads = 256;
  return with_type(to_type, [&]<typename To>(To) {
    const auto run = [&]<typename From>(From) {
      return launch(device, "convert", convert_kernel<From, To>,
                    blocks_for(rows * stride, kThreads), kThreads, 0,
                    static_cast<const From*>(values), rows, width, stride, static_cast<To*>(out));
    };
    if (from == DType::kF32) return run(0.0f);
    return with_type(from, run);
  });
}

}  // namespace infllm::cuda
