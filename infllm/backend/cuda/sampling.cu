// SPDX-License-Identifier: Apache-2.0
//
// The best logits of a row (ops/sampling.h), a block of 1024 threads a row, two passes over it:
//
//   1. Each thread finds the largest logit of its share, v = t, t + 1024, ... The 256th largest of
//      these 1024 numbers, the floor, is at most the row's 256th largest.
//   2. Everything from the floor on goes to a list in shared memory, some 300 entries when logits
//      and places have little to do with each other, and the weights are added up.
//
// The list is sorted and its head written. A row that overflows the list (thousands of equal
// logits, say) gets its floor by bisection: first the value of the 256th largest, then, among
// equals, the largest id that still belongs to it.
//
// Logits are compared as integers: a 16-bit number's order is that of its bits with the sign turned
// (-0 is made 0 first). An entry is value << 32 | ~id, so that of equals the smaller id is larger.
#include <climits>

#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/backend/cuda/rows.h"

namespace infllm::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kListed = 4096;  // a power of two
using Entry = unsigned long long;

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
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (count(middle) >= wanted ? low : high) = middle;
  }
  return low;
}

// Largest first. `size` is a power of two.
__device__ void sort(Entry* list, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      __syncthreads();
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

template <typename T>
__global__ void __launch_bounds__(kThreads)
    top_logits_kernel(const T* logits, std::int32_t vocabulary, std::int32_t vectors,
                      const float* temperatures, TopLogits* out) {
  __shared__ Entry list[kListed];
  __shared__ int listed;
  __shared__ int broken;
  start_next();
  wait_for_previous();
  const T* row = logits + std::int64_t{blockIdx.x} * vocabulary;
  TopLogits& result = out[blockIdx.x];
  const int forbidden = order_of<T>(-INFINITY);
  // body(logit, id) of this thread's share: eight at a time, and what does not fit one by one. A
  // single block has little else to do than to wait for memory, so it asks for several at once.
  const auto for_share = [&](auto&& body) {
    constexpr int kAtOnce = 3;
#pragma unroll 1
    for (std::int32_t first = threadIdx.x; first < vectors; first += kAtOnce * kThreads) {
      Vector<T> held[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const std::int32_t v = min(first + j * kThreads, vectors - 1);
        held[j] = *reinterpret_cast<const Vector<T>*>(row + std::int64_t{v} * kVector);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const std::int32_t v = first + j * kThreads;
        if (v >= vectors) break;
#pragma unroll
        for (int i = 0; i < kVector; ++i) body(to_float(held[j].values[i]), v * kVector + i);
      }
    }
#pragma unroll 1
    for (std::int32_t id = vectors * kVector + threadIdx.x; id < vocabulary; id += kThreads) {
      body(to_float(row[id]), id);
    }
  };

  if (threadIdx.x == 0) {
    listed = 0;
    broken = INT_MAX;
  }
  __syncthreads();
  int best = forbidden;
  int allowed = 0;
  for_share([&](float logit, std::int32_t id) {
    if (isnan(logit) || logit == INFINITY) atomicMin(&broken, id);
    best = max(best, order_of<T>(logit));
    allowed += logit > -INFINITY ? 1 : 0;
  });
  allowed = block_sum(allowed);
  const int wanted = min(allowed, TopLogits::kMost);
  if (broken != INT_MAX || wanted == 0) {  // the same in every thread
    if (threadIdx.x == 0) {
      result.weight = 0;
      result.count = 0;
      result.broken = broken != INT_MAX ? broken : -1;
    }
    return;
  }
  const auto shares_from = [&](std::int64_t x) { return __syncthreads_count(best >= x ? 1 : 0); };
  const int highest = static_cast<int>(bisect(forbidden, 0x10000, 1, shares_from));
  const int floor_order =
      max(forbidden + 1, static_cast<int>(bisect(forbidden, 0x10000, wanted, shares_from)));

  const float temperature = temperatures[blockIdx.x];
  const float largest = logit_of<T>(highest);
  const float log2_scale = temperature > 0 ? 1.44269504f / temperature : 0.0f;
  float share_weight = 0;
  for_share([&](float logit, std::int32_t id) {
    share_weight += exp2f((logit - largest) * log2_scale);
    if (order_of<T>(logit) < floor_order) return;
    const int at = atomicAdd(&listed, 1);
    if (at < kListed) list[at] = entry_of(order_of<T>(logit), id);
  });
  const double weight = temperature > 0 ? block_sum(static_cast<double>(share_weight)) : 0;
  __syncthreads();

  if (listed > kListed) {
    const auto row_from = [&](std::int64_t x) {
      int count = 0;
      for_share([&](float logit, std::int32_t) { count += order_of<T>(logit) >= x ? 1 : 0; });
      return block_sum(count);
    };
    const int value = static_cast<int>(bisect(floor_order, 0x10000, wanted, row_from));
    const int above = row_from(value + 1);
    const auto equals_from = [&](std::int64_t x) {  // with ids up to vocabulary - x
      int count = 0;
      for_share([&](float logit, std::int32_t id) {
        count += order_of<T>(logit) == value && id <= vocabulary - x ? 1 : 0;
      });
      return block_sum(count);
    };
    const std::int64_t last_id =
        vocabulary - bisect(1, vocabulary + 1, wanted - above, equals_from);
    if (threadIdx.x == 0) listed = 0;
    __syncthreads();
    for_share([&](float logit, std::int32_t id) {
      const int order = order_of<T>(logit);
      if (order > value || (order == value && id <= last_id)) {
        list[atomicAdd(&listed, 1)] = entry_of(order, id);
      }
    });
    __syncthreads();
  }

  int size = TopLogits::kMost;
  while (size < listed) size *= 2;
  for (int i = listed + threadIdx.x; i < size; i += kThreads) list[i] = 0;
  sort(list, size);
  for (int i = threadIdx.x; i < wanted; i += kThreads) {
    result.logit[i] = logit_of<T>(static_cast<int>(list[i] >> 32));
    result.token[i] = static_cast<std::int32_t>(~static_cast<std::uint32_t>(list[i]));
  }
  if (threadIdx.x == 0) {
    result.weight = weight;
    result.count = wanted;
    result.broken = -1;
  }
}

}  // namespace

Status top_logits(const Backend& backend, const TopLogitsParams& p, Workspace) {
  const Device& device = device_of(backend);
  const auto vocabulary = static_cast<std::int32_t>(p.vocabulary);
  const std::int32_t vectors = is_vector_aligned(p.logits, vocabulary) ? vocabulary / kVector : 0;
  return with_type(backend.kernels->activation, [&]<typename T>(T) {
    return launch(device, "top_logits", top_logits_kernel<T>, static_cast<unsigned>(p.rows),
                  kThreads, 0, static_cast<const T*>(p.logits), vocabulary, vectors, p.temperatures,
                  p.out);
  });
}

}  // namespace infllm::cuda
