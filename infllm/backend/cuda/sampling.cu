// SPDX-License-Identifier: Apache-2.0
//
// The best logits of a row (ops/sampling.h), in two kernels:
//
//   1. Over the whole device: the row's vectors are dealt out to 512 shares, v = s, s + 512, ...
//      Of each the largest logit, the weight relative to it, and what is broken.
//   2. A block of 512 threads a row, a share each: the 256th largest of the 512 largest logits, the
//      floor, is at most the row's 256th largest. Everything from the floor on goes to a list in
//      shared memory, some 350 entries when logits and places have little to do with each other;
//      only shares that reach the floor are read again. Where one logit is wanted, the floor is the
//      largest.
//
// The list is sorted and its head written. A row that overflows the list (thousands of equal
// logits, say) gets its floor by bisection: first the value of the last one wanted, then, among
// equals, the largest id that still belongs to it.
//
// Logits are compared as integers: a 16-bit number's order is that of its bits with the sign turned
// (-0 is made 0 first). An entry is value << 32 | ~id, so that of equals the smaller id is larger.
//
// Both run once a step, after weights of many times the second-level cache, so their instructions
// come from memory: loops are kept short and not unrolled further than loads have to be.
#include <climits>

#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/backend/cuda/rows.h"
#include "infllm/core/arena.h"

namespace infllm::cuda {
namespace {

constexpr int kShares = 512;  // of a row; a thread each in the second kernel
constexpr int kThreads = kShares;
constexpr int kParts = 8;  // of a share, a thread each in the first
constexpr int kPartThreads = 128;
constexpr int kPartBlocks = kShares * kParts / kPartThreads;  // of a row
constexpr int kListed = 2048;                                 // a power of two
using Entry = unsigned long long;

struct alignas(16) Share {
  std::int32_t best;    // order of the largest logit
  std::int32_t broken;  // the smallest id whose logit is NaN or plus infinity; INT_MAX: none
  float weight;         // sum of exp((l - best) / temperature); 0 when the temperature is 0
};

__device__ __nv_bfloat162 largest(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2_nan(a, b); }
__device__ __half2 largest(__half2 a, __half2 b) { return __hmax2_nan(a, b); }
__device__ __nv_bfloat162 twice(__nv_bfloat16 x) { return __bfloat162bfloat162(x); }
__device__ __half2 twice(__half x) { return __half2half2(x); }

template <typename T>
struct Row {
  const T* logits;
  std::int32_t vocabulary;
  std::int32_t vectors;  // 16-byte units; what is behind them, or all, is read one by one

  __device__ Vector<T> vector(std::int32_t v) const {
    return reinterpret_cast<const Vector<T>*>(logits)[v];
  }
  // body(logit, id) of one vector's logits, and of what lies behind the vectors.
  template <typename Body>
  __device__ void visit_vector(std::int32_t v, Body&& body) const {
    const Vector<T> held = vector(v);
#pragma unroll
    for (int i = 0; i < kVector; ++i) body(to_float(held.values[i]), v * kVector + i);
  }
  template <typename Body>
  __device__ void visit_rest(std::int32_t first, std::int32_t stride, Body&& body) const {
#pragma unroll 1
    for (std::int32_t id = vectors * kVector + first; id < vocabulary; id += stride) {
      body(to_float(logits[id]), id);
    }
  }
  template <typename Body>
  __device__ void visit(std::int32_t first, std::int32_t stride, Body&& body) const {
#pragma unroll 1
    for (std::int32_t v = first; v < vectors; v += stride) visit_vector(v, body);
    visit_rest(first, stride, body);
  }
};

template <typename T>
__device__ int order_of(float logit) {
  const T rounded = to<T>(logit + 0.0f);
  const int bits = *reinterpret_cast<const std::uint16_t*>(&rounded);
  return (bits & 0x8000) != 0 ? 0x7fff - (bits & 0x7fff) : 0x8000 + bits;
}

template <typename T>
__device__ float logit_of(int order) {
  const auto bits =
      static_cast<std::uint16_t>(order >= 0x8000 ? order - 0x8000 : 0x8000 | (0x7fff - order));
  return to_float(*reinterpret_cast<const T*>(&bits));
}

__device__ Entry entry_of(int order, std::int32_t id) {
  return static_cast<Entry>(order) << 32 | ~static_cast<std::uint32_t>(id);
}

// The sum of every thread's value, for every thread; in the same order every time.
template <typename Value>
__device__ Value block_sum(Value value) {
  __shared__ Value of_warp[kThreads / 32];
  __syncthreads();  // the last sum has been read
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffff, value, lane);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  Value sum = 0;
  for (const Value& part : of_warp) sum += part;
  return sum;
}

// The largest x in [low, high) for which count(x) is at least `wanted`; low if there is none.
// count(x) falls with x and is the same in every thread.
template <typename Count>
__device__ std::int64_t bisect(std::int64_t low, std::int64_t high, int wanted, Count&& count) {
#pragma unroll 1
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (count(middle) >= wanted ? low : high) = middle;
  }
  return low;
}

// Largest first. `size` is a power of two.
__device__ void sort(Entry* list, int size) {
  bool in_warp = false;  // the step before kept to entries of the same warp
#pragma unroll 1
  for (int run = 2; run <= size; run *= 2) {
#pragma unroll 1
    for (int step = run / 2; step > 0; step /= 2) {
      if (in_warp && step < 32) {
        __syncwarp();
      } else {
        __syncthreads();
      }
      in_warp = step < 32;
#pragma unroll 1
      for (int i = threadIdx.x; i < size; i += kThreads) {
        const int other = i ^ step;
        if (other < i) continue;
        const bool falls = (i & run) == 0;
        if ((list[i] < list[other]) == falls) {
          const Entry kept = list[i];
          list[i] = list[other];
          list[other] = kept;
        }
      }
    }
  }
  __syncthreads();
}

__device__ float log2_scale_of(float temperature) {
  return temperature > 0 ? 1.44269504f / temperature : 0.0f;
}

// The parts of a share are 4 lanes apart: the four shares of a warp lie side by side.
template <typename T>
__global__ void __launch_bounds__(kPartThreads)
    shares_kernel(const T* logits, std::int32_t vocabulary, std::int32_t vectors,
                  const float* temperatures, Share* shares) {
  constexpr int kApart = 32 / kParts;
  constexpr int kAtOnce = 3;
  constexpr std::int32_t kStride = kParts * kShares;
  start_next();
  const std::int64_t row_index = blockIdx.x / kPartBlocks;
  const int thread = static_cast<int>(blockIdx.x % kPartBlocks * kPartThreads + threadIdx.x);
  const int part = thread % 32 / kApart;
  const int share = thread / 32 * kApart + thread % kApart;
  const std::int32_t first = share + part * kShares;
  const Row<T> row{logits + row_index * vocabulary, vocabulary, vectors};
  const float temperature = temperatures[row_index];  // there before the step began
  wait_for_previous();

  auto best = twice(to<T>(-INFINITY));
  using Pair = decltype(best);
#pragma unroll 1
  for (std::int32_t next = first; next < vectors; next += kAtOnce * kStride) {
    Vector<T> held[kAtOnce];  // a thread has little else to do than to wait for them
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) held[j] = row.vector(min(next + j * kStride, vectors - 1));
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (next + j * kStride >= vectors) break;
#pragma unroll
      for (int i = 0; i < kVector; i += 2) {
        best = largest(best, *reinterpret_cast<const Pair*>(&held[j].values[i]));
      }
    }
  }
  row.visit_rest(first, kStride,
                 [&](float logit, std::int32_t) { best = largest(best, twice(to<T>(logit))); });
#pragma unroll
  for (int lane = kApart; lane < 32; lane *= 2) {
    best = largest(best, __shfl_xor_sync(0xffffffff, best, lane));
  }
  best = largest(best, __lowhigh2highlow(best));

  const float most = to_float(best.x);
  Share result{.best = order_of<T>(most), .broken = INT_MAX, .weight = 0};
  if (isnan(most) || most == INFINITY) {
    row.visit(first, kStride, [&](float logit, std::int32_t id) {
      if (isnan(logit) || logit == INFINITY) result.broken = min(result.broken, id);
    });
  } else if (temperature > 0 && most > -INFINITY) {
    const float log2_scale = log2_scale_of(temperature);
    row.visit(first, kStride, [&](float logit, std::int32_t) {
      result.weight += exp2f((logit - most) * log2_scale);
    });
  }
#pragma unroll
  for (int lane = kApart; lane < 32; lane *= 2) {
    result.broken = min(result.broken, __shfl_xor_sync(0xffffffff, result.broken, lane));
    result.weight += __shfl_xor_sync(0xffffffff, result.weight, lane);
  }
  if (part == 0) shares[row_index * kShares + share] = result;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    top_logits_kernel(const T* logits, std::int32_t vocabulary, std::int32_t vectors,
                      const float* temperatures, const Share* shares, TopLogits* out) {
  __shared__ Entry list[kListed];
  __shared__ std::uint16_t reaching[kShares];  // shares that reach the floor
  __shared__ int listed;
  __shared__ int num_reaching;
  __shared__ int broken;
  __shared__ int highest;
  start_next();
  const int forbidden = order_of<T>(-INFINITY);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    listed = 0;
    num_reaching = 0;
    broken = INT_MAX;
    highest = forbidden;
  }
  const float temperature = temperatures[blockIdx.x];  // there before the step began
  const Row<T> row{logits + std::int64_t{blockIdx.x} * vocabulary, vocabulary, vectors};
  TopLogits& result = out[blockIdx.x];
  __syncthreads();
  wait_for_previous();
  const Share share = shares[std::int64_t{blockIdx.x} * kShares + thread];
  const int highest_of_warp = __reduce_max_sync(0xffffffff, share.best);
  if (thread % 32 == 0) atomicMax(&highest, highest_of_warp);
  if (share.broken != INT_MAX) atomicMin(&broken, share.broken);
  __syncthreads();
  if (broken != INT_MAX || highest == forbidden) {  // the same in every thread
    if (thread == 0) {
      result.weight = 0;
      result.count = 0;
      result.broken = broken != INT_MAX ? broken : -1;
    }
    return;
  }

  const int most = temperature > 0 ? TopLogits::kMost : 1;
  int floor_order = highest;
  double weight = 0;
  if (temperature > 0) {
    const auto shares_from = [&](std::int64_t x) {
      return __syncthreads_count(share.best >= x ? 1 : 0);
    };
    floor_order =
        max(forbidden + 1, static_cast<int>(bisect(forbidden, highest + 1, most, shares_from)));
    if (share.best > forbidden) {
      const float lower = logit_of<T>(share.best) - logit_of<T>(highest);
      weight = static_cast<double>(share.weight) * exp2f(lower * log2_scale_of(temperature));
    }
    weight = block_sum(weight);
  }
  if (share.best >= floor_order) {
    reaching[atomicAdd(&num_reaching, 1)] = static_cast<std::uint16_t>(thread);
  }
  __syncthreads();
  const auto take = [&](float logit, std::int32_t id) {
    const int order = order_of<T>(logit);
    if (order < floor_order) return;
    const int at = atomicAdd(&listed, 1);
    if (at < kListed) list[at] = entry_of(order, id);
  };
  const int vectors_each = (vectors + kShares - 1) / kShares;
#pragma unroll 1
  for (int i = thread; i < num_reaching * vectors_each; i += kThreads) {
    const std::int32_t v = reaching[i / vectors_each] + i % vectors_each * kShares;
    if (v < vectors) row.visit_vector(v, take);
  }
  row.visit_rest(thread, kThreads, take);
  __syncthreads();

  if (listed > kListed) {
    const auto row_from = [&](std::int64_t x) {
      int count = 0;
      row.visit(thread, kThreads,
                [&](float logit, std::int32_t) { count += order_of<T>(logit) >= x ? 1 : 0; });
      return block_sum(count);
    };
    const int value = static_cast<int>(bisect(floor_order, highest + 1, most, row_from));
    const int above = row_from(value + 1);
    const auto equals_from = [&](std::int64_t x) {  // with ids up to vocabulary - x
      int count = 0;
      row.visit(thread, kThreads, [&](float logit, std::int32_t id) {
        count += order_of<T>(logit) == value && id <= vocabulary - x ? 1 : 0;
      });
      return block_sum(count);
    };
    const std::int64_t last_id =
        vocabulary - bisect(1, std::int64_t{vocabulary} + 1, most - above, equals_from);
    if (thread == 0) listed = 0;
    __syncthreads();
    row.visit(thread, kThreads, [&](float logit, std::int32_t id) {
      const int order = order_of<T>(logit);
      if (order > value || (order == value && id <= last_id)) {
        list[atomicAdd(&listed, 1)] = entry_of(order, id);
      }
    });
    __syncthreads();
  }

  int size = 1;
  while (size < listed) size *= 2;
  for (int i = listed + thread; i < size; i += kThreads) list[i] = 0;
  sort(list, size);
  const int count = min(listed, most);
  if (thread < count) {
    result.logit[thread] = logit_of<T>(static_cast<int>(list[thread] >> 32));
    result.token[thread] = static_cast<std::int32_t>(~static_cast<std::uint32_t>(list[thread]));
  }
  if (thread == 0) {
    result.weight = weight;
    result.count = count;
    result.broken = -1;
  }
}

}  // namespace

std::size_t top_logits_bytes(const Backend&, const TopLogitsParams& p) {
  ArenaSize size;
  size.take<Share>(p.rows * kShares);
  return size.bytes();
}

Status top_logits(const Backend& backend, const TopLogitsParams& p, Workspace workspace) {
  const Device& device = device_of(backend);
  const auto vocabulary = static_cast<std::int32_t>(p.vocabulary);
  const std::int32_t vectors = is_vector_aligned(p.logits, vocabulary) ? vocabulary / kVector : 0;
  Arena arena(workspace);
  Share* const shares = arena.take<Share>(p.rows * kShares);
  const auto rows = static_cast<unsigned>(p.rows);
  return with_type(backend.kernels->activation, [&]<typename T>(T) -> Status {
    const auto* logits = static_cast<const T*>(p.logits);
    INFLLM_TRY(launch(device, "top_logits", shares_kernel<T>, rows * kPartBlocks, kPartThreads, 0,
                      logits, vocabulary, vectors, p.temperatures, shares));
    return launch(device, "top_logits", top_logits_kernel<T>, rows, kThreads, 0, logits, vocabulary,
                  vectors, p.temperatures, shares, p.out);
  });
}

}  // namespace infllm::cuda
