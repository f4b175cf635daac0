// SPDX-License-Identifier: Apache-2.0
//
// Rows that move each number once: embedding, norm, rotary positions, SwiGLU, gather. All are bound
// by memory, so a thread handles 16 bytes where the arrays allow it (kPer = 8) and single elements
// elsewhere.
#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/backend/cuda/rows.h"

namespace infllm::cuda {
namespace {

constexpr int kThreads = 256;

template <int kPer, typename T>
__device__ __forceinline__ void get(const T* from, float (&x)[kPer]) {
  if constexpr (kPer == kVector) {
    load(from, x);
  } else {
    x[0] = to_float(*from);
  }
}

template <int kPer, typename T>
__device__ __forceinline__ void put(T* where, const float (&x)[kPer]) {
  if constexpr (kPer == kVector) {
    store(where, x);
  } else {
    *where = to<T>(x[0]);
  }
}

__device__ __forceinline__ std::int64_t thread_index() {
  return std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
}

// A row of the table for each token; a token outside the vocabulary gives zeros.
template <typename T, int kPer>
__global__ void embed_kernel(const T* table, std::int64_t vocabulary, std::int64_t width,
                             const std::int32_t* ids, std::int64_t tokens, float scale, T* y) {
  start_next();
  wait_for_previous();
  const std::int64_t units = width / kPer;
  const std::int64_t token = thread_index() / units;
  if (token >= tokens) return;
  const std::int64_t column = thread_index() % units * kPer;
  const std::int64_t id = ids[token];
  float x[kPer] = {};
  if (id >= 0 && id < vocabulary) get<kPer>(table + id * width + column, x);
#pragma unroll
  for (int i = 0; i < kPer; ++i) x[i] *= scale;
  put<kPer>(y + token * width + column, x);
}

constexpr int kNormThreads = 512;
constexpr int kNormRows = 4;    // of a block, when there are many
constexpr int kNormBlocks = 4;  // that a multiprocessor holds

// The sums of every thread's values, for every thread.
template <int kRows>
__device__ void block_sum(float (&values)[kRows]) {
  __shared__ float of_warp[kNormThreads / 32][kRows];
#pragma unroll
  for (float& value : values) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffff, value, lane);
  }
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) of_warp[threadIdx.x / 32][r] = values[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    values[r] = 0;
#pragma unroll
    for (int warp = 0; warp < kNormThreads / 32; ++warp) values[r] += of_warp[warp][r];
  }
}

// A block kRows rows, of which each thread keeps the first kPer numbers between the two passes. The
// more rows, the more reads are under way at a time, and the fewer of the weights. A row's sum is
// added up in the same order whatever kRows. y may be x: a thread writes only what it has read.
template <typename T, int kPer, int kRows>
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_kernel(const T* x, const float* weight, std::int64_t tokens, std::int64_t width,
                    float epsilon, T* y) {
  start_next();
  // Weights that were last used a step ago come from memory, which may be busy with other weights.
  if (kPer == kVector && blockIdx.x == 0 && threadIdx.x == 0) {
    prefetch(weight, static_cast<int>(width * sizeof(float)));
  }
  wait_for_previous();
  const std::int64_t first = std::int64_t{blockIdx.x} * kRows;
  const std::int64_t begin = std::int64_t{threadIdx.x} * kPer;
  constexpr std::int64_t kStride = std::int64_t{kNormThreads} * kPer;
  // Behind the last row the last one is computed again, and not written.
  const T* rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) rows[r] = x + min(first + r, tokens - 1) * width;

  float held[kRows][kPer];
  float squares[kRows] = {};
  if (begin < width) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) get<kPer>(rows[r] + begin, held[r]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (const float value : held[r]) squares[r] += value * value;
    }
  }
  for (std::int64_t column = begin + kStride; column < width; column += kStride) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float more[kPer];
      get<kPer>(rows[r] + column, more);
#pragma unroll
      for (const float value : more) squares[r] += value * value;
    }
  }
  block_sum(squares);
  float scale[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    scale[r] = 1 / sqrtf(squares[r] / static_cast<float>(width) + epsilon);
  }

  for (std::int64_t column = begin; column < width; column += kStride) {
    alignas(16) float weights[kPer];
    if constexpr (kPer == kVector) {
      *reinterpret_cast<float4*>(weights) = *reinterpret_cast<const float4*>(weight + column);
      *reinterpret_cast<float4*>(weights + 4) =
          *reinterpret_cast<const float4*>(weight + column + 4);
    } else {
      weights[0] = weight[column];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= tokens) break;
      float values[kPer];
      if (column == begin) {
#pragma unroll
        for (int k = 0; k < kPer; ++k) values[k] = held[r][k];
      } else {
        get<kPer>(rows[r] + column, values);
      }
#pragma unroll
      for (int k = 0; k < kPer; ++k) values[k] = values[k] * scale[r] * weights[k];
      put<kPer>(y + (first + r) * width + column, values);
    }
  }
}

// A thread rotates kPer pairs (x[i], x[i + D/2]) of one head.
template <typename T, int kPer>
__global__ void rope_kernel(T* x, std::int64_t row_stride, std::int64_t tokens, int heads, int half,
                            const float* cosines, const float* sines) {
  start_next();
  wait_for_previous();
  const int units = half / kPer;
  const std::int64_t index = thread_index();
  const std::int64_t token = index / (heads * units);
  if (token >= tokens) return;
  const int unit = static_cast<int>(index % (heads * units));
  const int i = unit % units * kPer;
  T* low = x + token * row_stride + std::int64_t{unit / units} * 2 * half + i;
  const float* c = cosines + token * half + i;
  const float* s = sines + token * half + i;
  float a[kPer];
  float b[kPer];
  get<kPer>(low, a);
  get<kPer>(low + half, b);
#pragma unroll
  for (int k = 0; k < kPer; ++k) {
    const float turned = a[k] * c[k] - b[k] * s[k];
    b[k] = b[k] * c[k] + a[k] * s[k];
    a[k] = turned;
  }
  put<kPer>(low, a);
  put<kPer>(low + half, b);
}

template <typename T, int kPer>
__global__ void swiglu_kernel(const T* x, std::int64_t tokens, std::int64_t width, T* y) {
  start_next();
  wait_for_previous();
  const std::int64_t units = width / kPer;
  const std::int64_t token = thread_index() / units;
  if (token >= tokens) return;
  const std::int64_t column = thread_index() % units * kPer;
  float gate[kPer];
  float up[kPer];
  get<kPer>(x + token * 2 * width + column, gate);
  get<kPer>(x + token * 2 * width + width + column, up);
#pragma unroll
  for (int k = 0; k < kPer; ++k) gate[k] = gate[k] / (1 + expf(-gate[k])) * up[k];
  put<kPer>(y + token * width + column, gate);
}

template <typename Unit>
__global__ void gather_kernel(const Unit* x, std::int64_t row_stride, const std::int32_t* rows,
                              std::int64_t count, std::int64_t width, Unit* y) {
  start_next();
  wait_for_previous();
  const std::int64_t i = thread_index() / width;
  if (i >= count) return;
  const std::int64_t column = thread_index() % width;
  const std::int64_t row = rows == nullptr ? i : rows[i];
  y[i * width + column] = x[row * row_stride + column];
}

// body(kPer) as a compile-time constant: 8 elements a thread, or 1.
template <typename Body>
Status with_width(bool vectors, Body&& body) {
  if (vectors) return body(std::integral_constant<int, kVector>());
  return body(std::integral_constant<int, 1>());
}

unsigned blocks_for(std::int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

}  // namespace

Status embed(const Backend& backend, const EmbedParams& p, Workspace) {
  const Device& device = device_of(backend);
  const std::int64_t width = p.table->values.shape[1];
  const bool vectors = is_vector_aligned(p.table->values.data, width) && is_vector_aligned(p.y);
  return with_type(backend.kernels->activation, [&]<typename T>(T) {
    return with_width(vectors, [&]<int kPer>(std::integral_constant<int, kPer>) {
      return launch(device, "embed", embed_kernel<T, kPer>, blocks_for(p.tokens * width / kPer),
                    kThreads, 0, static_cast<const T*>(p.table->values.data),
                    p.table->values.shape[0], width, p.token_ids, p.tokens, p.scale,
                    static_cast<T*>(p.y));
    });
  });
}

Status rms_norm(const Backend& backend, const RmsNormParams& p, Workspace) {
  const Device& device = device_of(backend);
  const bool vectors =
      is_vector_aligned(p.x, p.width) && is_vector_aligned(p.y) && is_vector_aligned(p.weight);
  return with_type(backend.kernels->activation, [&]<typename T>(T) {
    return with_width(vectors, [&]<int kPer>(std::integral_constant<int, kPer>) {
      const auto start = [&]<int kRows>(std::integral_constant<int, kRows>) {
        return launch(device, "rms_norm", rms_norm_kernel<T, kPer, kRows>,
                      static_cast<unsigned>((p.tokens + kRows - 1) / kRows), kNormThreads, 0,
                      static_cast<const T*>(p.x), static_cast<const float*>(p.weight), p.tokens,
                      p.width, p.epsilon, static_cast<T*>(p.y));
      };
      // Many rows together as soon as the device is full.
      return p.tokens < kNormRows * kNormBlocks * device.sm_count
                 ? start(std::integral_constant<int, 1>())
                 : start(std::integral_constant<int, kNormRows>());
    });
  });
}

Status rope(const Backend& backend, const RopeParams& p, Workspace) {
  const Device& device = device_of(backend);
  const int half = p.head_dim / 2;
  const bool vectors = is_vector_aligned(p.x, p.row_stride) && half % kVector == 0;
  return with_type(backend.kernels->activation, [&]<typename T>(T) {
    return with_width(vectors, [&]<int kPer>(std::integral_constant<int, kPer>) {
      return launch(device, "rope", rope_kernel<T, kPer>,
                    blocks_for(p.tokens * p.heads * half / kPer), kThreads, 0, static_cast<T*>(p.x),
                    p.row_stride, p.tokens, p.heads, half, p.cos, p.sin);
    });
  });
}

Status swiglu(const Backend& backend, const SwigluParams& p, Workspace) {
  const Device& device = device_of(backend);
  const bool vectors = is_vector_aligned(p.x, p.width) && is_vector_aligned(p.y);
  return with_type(backend.kernels->activation, [&]<typename T>(T) {
    return with_width(vectors, [&]<int kPer>(std::integral_constant<int, kPer>) {
      return launch(device, "swiglu", swiglu_kernel<T, kPer>, blocks_for(p.tokens * p.width / kPer),
                    kThreads, 0, static_cast<const T*>(p.x), p.tokens, p.width,
                    static_cast<T*>(p.y));
    });
  });
}

Status gather(const Backend& backend, const GatherParams& p, Workspace) {
  const Device& device = device_of(backend);
  const auto* x = static_cast<const std::uint16_t*>(p.x) + p.first_column;
  if (is_vector_aligned(x, p.row_stride) && is_vector_aligned(p.y, p.width)) {
    const std::int64_t width = p.width / kVector;
    return launch(device, "gather", gather_kernel<uint4>, blocks_for(p.count * width), kThreads, 0,
                  reinterpret_cast<const uint4*>(x), p.row_stride / kVector, p.rows, p.count, width,
                  static_cast<uint4*>(p.y));
  }
  return launch(device, "gather", gather_kernel<std::uint16_t>, blocks_for(p.count * p.width),
                kThreads, 0, x, p.row_stride, p.rows, p.count, p.width,
                static_cast<std::uint16_t*>(p.y));
}

}  // namespace infllm::cuda
