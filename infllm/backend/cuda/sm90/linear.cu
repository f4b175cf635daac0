// SPDX-License-Identifier: Apache-2.0
//
// One thread block a multiprocessor. The rows of W are shared out evenly among the blocks. In a
// block one thread keeps a ring of slots of 32 KB, one row or a few, filled with bulk copies. 512
// threads hold x in registers, eight columns in kVectors places each, and turn a slot of rows at a
// time into partial sums. Those of eight rows are folded over the lanes of a warp together: 9
// exchanges where eight single rows would take 40. What the warps have left over is added up for 32
// rows at a time by one warp. With SwiGLU behind the product a block shares out pairs of rows, one
// of the gate and one of what it opens, which come in turn, so that this warp has both.
//
// Weights depend on nothing, so the ring is filled before the kernel in front has ended: beside
// attention, which leaves memory idle. The kernel behind is let in when the last copy has been
// asked for. They are read once a step and leave the second-level cache first: instructions, norms'
// weights and what attention looks at stay. What was tried: docs/kernels/hopper-linear.md.
#include <cstddef>
#include <cstdint>

#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/backend/cuda/sm90/linear.h"
#include "infllm/backend/cuda/tile/barrier.cuh"
#include "infllm/backend/cuda/tile/ring.cuh"
#include "infllm/backend/cuda/tile/tma.cuh"
#include "infllm/ops/kernels.h"

namespace infllm::cuda::sm90 {
namespace {

using namespace tile;

constexpr int kWarps = 16;  // that compute; one more loads
constexpr int kConsumers = 32 * kWarps;
constexpr int kThreads = kConsumers + 32;
constexpr int kMaxVectors = 64 / kWarps;  // of a thread in a row: 16384 inputs
constexpr int kSlotBytes = 32 << 10;      // such a row
constexpr int kSlots = 6;
constexpr int kFolded = 8;  // rows that are folded together
constexpr int kBatch = 32;  // rows that are finished together

// Places in which a thread holds columns of a row of `units`.
constexpr int vectors_for(int units) {
  int vectors = 1;
  while (vectors * kConsumers < units) vectors *= 2;
  return vectors;
}
constexpr int slot_rows(int vectors) {
  const int rows = kMaxVectors / vectors;
  return rows < kFolded ? rows : kFolded;
}

struct Product {
  const std::byte* weight;
  const void* x;
  void* y;
  float alpha;
  float beta;
  const float* norm;  // null: x as it is
  float epsilon;
  int outputs;
  int units;  // of 16 bytes in a row
  int row_bytes;
  int slot_rows;  // rows of a slot
  int gates;      // rows of W that open others: the first half, or none
};

struct Shared {
  alignas(128) std::byte ring[kSlots][kSlotBytes];
  std::uint64_t full[kSlots];
  std::uint64_t empty[kSlots];
  float partial[2][kBatch][kWarps];
  float squares[kWarps];
};

// This block's rows of W: those of its outputs, or two for each.
struct Share {
  __device__ explicit Share(const Product& product) : p(product) {
    const std::int64_t outputs = p.outputs - p.gates;
    const auto begin = [&](std::int64_t block) {
      return static_cast<int>(block * outputs / static_cast<std::int64_t>(gridDim.x));
    };
    first = begin(blockIdx.x);
    rows = (begin(std::int64_t{blockIdx.x} + 1) - first) * (p.gates > 0 ? 2 : 1);
  }
  __device__ const std::byte* row(int r) const {
    const int of_weight = p.gates > 0 ? first + r / 2 + r % 2 * p.gates : first + r;
    return p.weight + std::int64_t{of_weight} * p.row_bytes;
  }

  const Product& p;
  int first;  // output
  int rows;
};

// All rows, as slots become free.
__device__ void load_rows(const Product& p, Shared& shared) {
  const Share share(p);
  RingCursor<kSlots> cursor;
  for (int row = 0; row < share.rows; row += p.slot_rows) {
    const int count = min(p.slot_rows, share.rows - row);
    mbarrier_wait(&shared.empty[cursor.slot], cursor.phase ^ 1);
    mbarrier_arrive_expect_tx(&shared.full[cursor.slot],
                              static_cast<std::uint32_t>(count * p.row_bytes));
    for (int k = 0; k < count; ++k) {
      tma_load_1d(&shared.full[cursor.slot], shared.ring[cursor.slot] + k * p.row_bytes,
                  share.row(row + k), static_cast<std::uint32_t>(p.row_bytes),
                  CacheHint::kEvictFirst);
    }
    cursor.advance();
  }
}

// Adds kFolded numbers of each lane up over the warp. Lanes 4 r .. 4 r + 3 have the sum of number r
// afterwards.
__device__ float fold(float (&sums)[kFolded], int lane) {
  int bit = 16;
#pragma unroll
  for (int half = kFolded / 2; half > 0; half /= 2, bit /= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? sums[i + half] : sums[i];
      const float given = upper ? sums[i] : sums[i + half];
      sums[i] = kept + __shfl_xor_sync(0xffffffff, given, bit);
    }
  }
  sums[0] += __shfl_xor_sync(0xffffffff, sums[0], 2);
  return sums[0] + __shfl_xor_sync(0xffffffff, sums[0], 1);
}

__device__ void consumers_sync() { named_barrier_sync(1, kConsumers); }

// The columns of x that are this thread's, zeros behind its end.
template <typename T, int kVectors>
__device__ void load_x(const Product& p, float (&x)[kVectors][kVector]) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int unit = v * kConsumers + static_cast<int>(threadIdx.x);
#pragma unroll
    for (float& value : x[v]) value = 0;
    if (unit < p.units) load(static_cast<const T*>(p.x) + unit * kVector, x[v]);
  }
}

// x as rms_norm() leaves it, rounded as there. `norm` are this thread's weights.
template <typename T>
__device__ void normalise(const Product& p, Shared& shared, const float (&norm)[kVector],
                          float (&x)[kVector]) {
  float sum = 0;
#pragma unroll
  for (const float value : x) sum += value * value;
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lane);
  if (threadIdx.x % 32 == 0) shared.squares[threadIdx.x / 32] = sum;
  consumers_sync();
  sum = 0;
#pragma unroll
  for (const float of_warp : shared.squares) sum += of_warp;
  const float scale = 1 / sqrtf(sum / static_cast<float>(p.units * kVector) + p.epsilon);
#pragma unroll
  for (int k = 0; k < kVector; ++k) x[k] = to_float(to<T>(x[k] * scale * norm[k]));
}

// Outputs of the batch that begins with row `first` of the share, by one warp. `before` is what y
// was where it is added to.
template <typename T>
__device__ void finish(const Share& share, int first, const float (&partial)[kBatch][kWarps],
                       float before) {
  const Product& p = share.p;
  const int lane = static_cast<int>(threadIdx.x);
  float sum = 0;
#pragma unroll
  for (const float of_warp : partial[lane]) sum += of_warp;
  if (p.gates > 0) {  // both rounded as if they had been written
    const float mine = to_float(to<T>(p.alpha * sum));
    const float opened = __shfl_down_sync(0xffffffff, mine, 1);
    if (lane % 2 != 0 || first + lane >= share.rows) return;
    T* y = static_cast<T*>(p.y) + share.first;
    y[(first + lane) / 2] = to<T>(mine / (1 + expf(-mine)) * opened);
    return;
  }
  if (first + lane >= share.rows) return;
  T* y = static_cast<T*>(p.y) + share.first;
  y[first + lane] = to<T>(p.beta != 0 ? p.alpha * sum + p.beta * before : p.alpha * sum);
}

template <typename T, int kVectors>
__device__ void multiply_rows(const Product& p, Shared& shared, const float (&norm)[kVector]) {
  constexpr int kSlotRows = slot_rows(kVectors);
  const Share share(p);
  RingCursor<kSlots> cursor;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  float x[kVectors][kVector];
  load_x<T>(p, x);
  if constexpr (kVectors == 1) {
    if (p.norm != nullptr) normalise<T>(p, shared, norm, x[0]);
  }
  // Where x has ended it is 0, and the row's last unit stands in for what is not there.
  int unit[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) unit[v] = min(v * kConsumers + thread, p.units - 1) * 16;
  int buffer = 0;
  float before = 0;
  for (int first = 0; first < share.rows; first += kFolded) {
    if (first % kBatch == 0 && p.beta != 0 && thread < kBatch && first + thread < share.rows) {
      before = to_float(static_cast<const T*>(p.y)[share.first + first + thread]);
    }
    float sums[kFolded] = {};
#pragma unroll
    for (int row = 0; row < kFolded; row += kSlotRows) {
      if (first + row >= share.rows) break;
      mbarrier_wait(&shared.full[cursor.slot], cursor.phase);
#pragma unroll
      for (int i = 0; i < kSlotRows; ++i) {
        // Rows behind the last one are whatever is there; nobody asks for their sums.
        const std::byte* weights = shared.ring[cursor.slot] + i * p.row_bytes;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          float w[kVector];
          load(reinterpret_cast<const T*>(weights + unit[v]), w);
#pragma unroll
          for (int k = 0; k < kVector; ++k) sums[row + i] = fmaf(w[k], x[v][k], sums[row + i]);
        }
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&shared.empty[cursor.slot]);
      cursor.advance();
    }
    const float sum = fold(sums, lane);
    float(&partial)[kBatch][kWarps] = shared.partial[buffer];
    if (lane % 4 == 0) partial[first % kBatch + lane / 4][thread / 32] = sum;
    const int next = first + kFolded;
    if (next % kBatch != 0 && next < share.rows) continue;
    // Two buffers: whoever passes here has also seen the end of the batch before the last.
    consumers_sync();
    if (thread < 32) finish<T>(share, first / kBatch * kBatch, partial, before);
    buffer ^= 1;
  }
}

// multiply_rows of as many vectors as the product needs.
template <typename T, int kVectors = 1>
__device__ void multiply(const Product& p, Shared& shared, const float (&norm)[kVector]) {
  if constexpr (kVectors < kMaxVectors) {
    if (p.units > kVectors * kConsumers) return multiply<T, 2 * kVectors>(p, shared, norm);
  }
  multiply_rows<T, kVectors>(p, shared, norm);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) linear_kernel(const __grid_constant__ Product p) {
  extern __shared__ __align__(128) std::byte memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], kWarps);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    if (threadIdx.x == kConsumers) {
      load_rows(p, shared);
      start_next();
    }
    wait_for_previous();
  } else {
    float norm[kVector] = {};  // read early: nobody writes weights
    const int unit = static_cast<int>(threadIdx.x);
    if (p.norm != nullptr && unit < p.units) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) norm[k] = p.norm[unit * kVector + k];
    }
    wait_for_previous();
    multiply<T>(p, shared, norm);
  }
}

}  // namespace

bool multiplies(const LinearParams& p) {
  return p.tokens == 1 && p.weight->inputs % kVector == 0 &&
         p.weight->inputs <= kMaxVectors * kConsumers * kVector;
}

bool fuses(const LinearParams& p) {
  const bool normalises = p.norm == nullptr || p.weight->inputs <= kConsumers * kVector;
  const bool gates = !p.gated || (p.weight->outputs % 2 == 0 && !p.accumulate);
  return multiplies(p) && normalises && gates;
}

Status linear(const Backend& backend, const LinearParams& p, std::span<std::byte>) {
  const Device& device = device_of(backend);
  const int units = static_cast<int>(p.weight->inputs / kVector);
  const Product product{.weight = p.weight->storage.data(),
                        .x = p.x,
                        .y = p.y,
                        .alpha = p.alpha,
                        .beta = p.accumulate ? 1.0f : 0.0f,
                        .norm = static_cast<const float*>(p.norm),
                        .epsilon = p.epsilon,
                        .outputs = static_cast<int>(p.weight->outputs),
                        .units = units,
                        .row_bytes = static_cast<int>(p.weight->inputs * 2),
                        .slot_rows = slot_rows(vectors_for(units)),
                        .gates = p.gated ? static_cast<int>(p.weight->outputs / 2) : 0};
  return with_type(backend.kernels->activation, [&]<typename T>(T) {
    const auto kernel = linear_kernel<T>;
    INFLLM_TRY(to_status("linear",
                         cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              static_cast<int>(sizeof(Shared)))));
    return launch(device, "linear", kernel, static_cast<unsigned>(device.sm_count), kThreads,
                  sizeof(Shared), product);
  });
}

}  // namespace infllm::cuda::sm90
