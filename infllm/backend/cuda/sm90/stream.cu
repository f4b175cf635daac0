// SPDX-License-Identifier: Apache-2.0
//
// One thread block a multiprocessor. The rows of each W are shared out evenly among the blocks. In
// a block one thread keeps a ring of slots of 32 KB, one row or a few, filled with bulk copies,
// through all products of the chain without regard to where one ends. 512 threads hold x in
// registers, eight columns in kVectors places each, and turn a slot of rows at a time into partial
// sums. Those of eight rows are folded over the lanes of a warp together: 9 exchanges where eight
// single rows would take 40. What the warps have left over is added up for 32 rows at a time by one
// warp.
//
// Between two products every block waits for all others, some 3 us from the last row of one to the
// first of the next; the ring holds 6 us of the memory's full rate, so memory does not notice.
//
// The kernel behind is let in when the last copy has been asked for. The kernel itself usually
// comes in early too, beside attention, which leaves memory idle: the ring is filled then. What was
// tried: docs/kernels/hopper-linear.md.
#include <algorithm>

#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/backend/cuda/sm90/stream.h"
#include "infllm/backend/cuda/tile/barrier.cuh"
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
  const float* norm;
  void* y;
  float alpha;
  float beta;
  int outputs;  // of y
  int units;    // of 16 bytes in a row
  int row_bytes;
  int slot_rows;  // rows of a slot
  bool gated;
};

struct Chain {
  Product products[kMostStreamed];
  int count;
  float epsilon;
  unsigned* arrivals;
};

struct Shared {
  alignas(128) std::byte ring[kSlots][kSlotBytes];
  std::uint64_t full[kSlots];
  std::uint64_t empty[kSlots];
  float partial[2][kBatch][kWarps];
  float squares[kWarps];
};

// This block's part of a product. Its rows of W are numbered in the order in which they come:
// gates and ups take turns.
struct Share {
  __device__ Share(const Product& product, unsigned block) : p(product) {
    const auto begin = [&](std::int64_t b) {
      return static_cast<int>(b * p.outputs / static_cast<std::int64_t>(gridDim.x));
    };
    first = begin(block);
    rows = (begin(std::int64_t{block} + 1) - first) * (p.gated ? 2 : 1);
  }
  __device__ const std::byte* row(int r) const {
    const int output = p.gated ? r % 2 * p.outputs + first + r / 2 : first + r;
    return p.weight + std::int64_t{output} * p.row_bytes;
  }

  const Product& p;
  int first;  // output
  int rows;
};

// The place of the next slot in the ring.
struct Cursor {
  int slot = 0;
  std::uint32_t parity = 0;
  __device__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// All rows of all products, as slots become free.
__device__ void load_rows(const Chain& chain, Shared& shared) {
  Cursor cursor;
  for (int i = 0; i < chain.count; ++i) {
    const Share share(chain.products[i], blockIdx.x);
    const Product& p = share.p;
    for (int row = 0; row < share.rows; row += p.slot_rows) {
      const int count = min(p.slot_rows, share.rows - row);
      // The first round finds every slot empty: a barrier that nobody arrived at has "finished" the
      // phase before its first.
      mbarrier_wait(&shared.empty[cursor.slot], cursor.parity ^ 1);
      mbarrier_arrive_expect_tx(&shared.full[cursor.slot],
                                static_cast<std::uint32_t>(count * p.row_bytes));
      for (int k = 0; k < count; ++k) {
        tma_load_1d(&shared.full[cursor.slot], shared.ring[cursor.slot] + k * p.row_bytes,
                    share.row(row + k), static_cast<std::uint32_t>(p.row_bytes));
      }
      cursor.advance();
    }
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

// What another block may have written during this kernel: past the multiprocessor's own cache.
template <typename T>
__device__ void load_fresh(const T* from, float (&x)[kVector]) {
  const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(from));
  const auto& v = reinterpret_cast<const Vector<T>&>(bits);
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = to_float(v.values[i]);
}
template <typename T>
__device__ float load_one_fresh(const T* from) {
  const std::uint16_t bits = __ldcg(reinterpret_cast<const std::uint16_t*>(from));
  return to_float(reinterpret_cast<const T&>(bits));
}

// The columns of x that are this thread's, zeros behind its end.
template <typename T, int kVectors>
__device__ void load_x(const Product& p, float epsilon, Shared& shared,
                       float (&x)[kVectors][kVector]) {
  const int thread = static_cast<int>(threadIdx.x);
  float squares = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int unit = v * kConsumers + thread;
#pragma unroll
    for (float& value : x[v]) value = 0;
    if (unit < p.units) load_fresh(static_cast<const T*>(p.x) + unit * kVector, x[v]);
#pragma unroll
    for (const float value : x[v]) squares += value * value;
  }
  if (p.norm == nullptr) return;
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) squares += __shfl_xor_sync(0xffffffff, squares, bit);
  if (thread % 32 == 0) shared.squares[thread / 32] = squares;
  consumers_sync();
  float sum = 0;
#pragma unroll
  for (const float of_warp : shared.squares) sum += of_warp;
  const float scale = 1 / sqrtf(sum / static_cast<float>(p.units * kVector) + epsilon);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int unit = v * kConsumers + thread;
    if (unit >= p.units) break;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      x[v][k] = to_float(to<T>(x[v][k] * scale * p.norm[unit * kVector + k]));
    }
  }
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
  T* y = static_cast<T*>(p.y) + share.first;
  if (p.gated) {
    const float up = to_float(to<T>(__shfl_down_sync(0xffffffff, sum, 1)));
    const float gate = to_float(to<T>(sum));
    if (lane % 2 == 0 && first + lane < share.rows) {
      y[(first + lane) / 2] = to<T>(gate / (1 + expf(-gate)) * up);
    }
  } else if (first + lane < share.rows) {
    y[first + lane] = to<T>(p.beta != 0 ? p.alpha * sum + p.beta * before : p.alpha * sum);
  }
}

template <typename T, int kVectors>
__device__ void multiply_rows(const Product& p, float epsilon, Shared& shared, Cursor& cursor) {
  constexpr int kSlotRows = slot_rows(kVectors);
  const Share share(p, blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  float x[kVectors][kVector];
  load_x<T>(p, epsilon, shared, x);
  // Where x has ended it is 0, and the row's last unit stands in for what is not there.
  int unit[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) unit[v] = min(v * kConsumers + thread, p.units - 1) * 16;
  int buffer = 0;
  float before = 0;
  for (int first = 0; first < share.rows; first += kFolded) {
    if (first % kBatch == 0 && p.beta != 0 && thread < kBatch && first + thread < share.rows) {
      before = load_one_fresh(static_cast<const T*>(p.y) + share.first + first + thread);
    }
    float sums[kFolded] = {};
#pragma unroll
    for (int row = 0; row < kFolded; row += kSlotRows) {
      if (first + row >= share.rows) break;
      mbarrier_wait(&shared.full[cursor.slot], cursor.parity);
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
__device__ void with_vectors(const Product& p, float epsilon, Shared& shared, Cursor& cursor) {
  if constexpr (kVectors < kMaxVectors) {
    if (p.units > kVectors * kConsumers) {
      return with_vectors<T, 2 * kVectors>(p, epsilon, shared, cursor);
    }
  }
  multiply_rows<T, kVectors>(p, epsilon, shared, cursor);
}

// Counters of a chain, each in a cache line of its own: arrivals at the end of each product. The
// last block to leave clears them.
constexpr int kLineWords = 32;

__device__ void arrive(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ unsigned arrived(const unsigned* counter) {
  unsigned count;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
  return count;
}

template <typename T>
__device__ void multiply(const Chain& chain, Shared& shared) {
  Cursor cursor;
  for (int i = 0; i < chain.count; ++i) {
    const Product& p = chain.products[i];
    if (i > 0) {
      if (threadIdx.x == 0) {
        while (arrived(chain.arrivals + (i - 1) * kLineWords) < gridDim.x) {
        }
      }
      consumers_sync();
    }
    with_vectors<T>(p, chain.epsilon, shared, cursor);
    if (chain.count == 1 || threadIdx.x >= 32) continue;
    __syncwarp();  // the warp that wrote y
    if (threadIdx.x != 0) continue;
    unsigned* counter = chain.arrivals + i * kLineWords;
    if (i < chain.count - 1) {
      __threadfence();
      arrive(counter);
    } else if (atomicAdd(counter, 1) == gridDim.x - 1) {
      for (int k = 0; k < chain.count; ++k) chain.arrivals[k * kLineWords] = 0;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) stream_kernel(const __grid_constant__ Chain chain) {
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
      load_rows(chain, shared);
      start_next();
    }
    wait_for_previous();
  } else {
    wait_for_previous();
    multiply<T>(chain, shared);
  }
}

}  // namespace

bool streams(const LinearWeight& weight) {
  return weight.inputs % kVector == 0 && weight.inputs <= kMaxVectors * kConsumers * kVector;
}

Status stream(const Device& device, DType activation, std::span<const StreamProduct> products,
              float epsilon) {
  Chain chain{
      .count = static_cast<int>(products.size()), .epsilon = epsilon, .arrivals = device.arrivals};
  for (std::size_t i = 0; i < products.size(); ++i) {
    const StreamProduct& given = products[i];
    const int row_bytes = static_cast<int>(given.weight->inputs * 2);
    chain.products[i] = {
        .weight = given.weight->storage.data(),
        .x = given.x,
        .norm = static_cast<const float*>(given.norm_weight),
        .y = given.y,
        .alpha = given.alpha,
        .beta = given.beta,
        .outputs = static_cast<int>(given.weight->outputs / (given.gated ? 2 : 1)),
        .units = static_cast<int>(given.weight->inputs / kVector),
        .row_bytes = row_bytes,
        .slot_rows = slot_rows(vectors_for(static_cast<int>(given.weight->inputs / kVector))),
        .gated = given.gated};
  }
  return with_type(activation, [&]<typename T>(T) {
    const auto kernel = stream_kernel<T>;
    INFLLM_TRY(to_status("linear",
                         cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              static_cast<int>(sizeof(Shared)))));
    return launch(device, "linear", kernel, static_cast<unsigned>(device.sm_count), kThreads,
                  sizeof(Shared), chain);
  });
}

}  // namespace infllm::cuda::sm90
