// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/backend/cuda/plain_linear.h"

namespace infllm::cuda {
namespace {

constexpr int kThreads = 256;

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

unsigned blocks_for(std::int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

}  // namespace

Status plain_product(const Device& device, const Product& p) {
  return with_type(p.dtype, [&]<typename T>(T) {
    return launch(device, "linear", plain_product_kernel<T>, blocks_for(p.tokens * p.outputs * 32),
                  kThreads, 0, p);
  });
}

Status convert(const Device& device, DType from, const void* values, DType to_type,
               std::int64_t rows, std::int64_t width, std::int64_t stride, void* out) {
  return with_type(to_type, [&]<typename To>(To) {
    const auto run = [&]<typename From>(From) {
      return launch(device, "convert", convert_kernel<From, To>, blocks_for(rows * stride),
                    kThreads, 0, static_cast<const From*>(values), rows, width, stride,
                    static_cast<To*>(out));
    };
    if (from == DType::kF32) return run(0.0f);
    return with_type(from, run);
  });
}

}  // namespace infllm::cuda
