// SPDX-License-Identifier: Apache-2.0
//
// The best logits of a row (ops/sampling.h), in two kernels:
//
//   1. Over the whole device: the row's vectors are dealt out to 1024 shares, v = s, s + 1024, ...
//      Of each the largest logit, the weight relative to it, how many are allowed, what is broken.
//   2. A block of 1024 threads a row, a share each: the 256th largest of the 1024 largest logits,
//      the floor, is at most the row's 256th largest. Everything from the floor on goes to a list
//      in shared memory, some 300 entries when logits and places have little to do with each other;
//      only shares that reach the floor are read again.
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
#include "infllm/core/arena.h"

namespace infllm::cuda {
namespace {

constexpr int kShares = 1024;  // of a row; a thread each in the second kernel
constexpr int kThreads = kShares;
constexpr int kParts = 4;  // of a share, a thread each in the first
constexpr int kPartThreads = 128;
constexpr int kPartBlocks = kShares * kParts / kPartThreads;  // of a row
constexpr int kListed = 4096;                                 // a power of two
using Entry = unsigned long long;

struct alignas(16) Share {
  std::int32_t best;     // order of the largest logit
  std::int32_t allowed;  // logits above minus infinity
  std::int32_t broken;   // the smallest id whose logit is NaN or plus infinity; INT_MAX: none
  float weight;          // sum of exp((l - best) / temperature); 0 when the temperature is 0
};

template <typename T>
struct Row {
  const T* logits;
  std::int32_t vocabulary;
  std::int32_t vectors;  // 16-byte units; what is behind them, or all, is read one by one

  // body(logit, id) of the vectors first, first + stride, ... and of as many single logits. Threads
  // have little else to do than to wait for memory, so they ask for kAtOnce vectors at once.
  template <int kAtOnce, typename Body>
  __device__ void visit(std::int32_t first, std::int32_t stride, Body&& body) const {
#pragma unroll 1
    for (std::int32_t next = first; next < vectors; next += kAtOnce * stride) {
      Vector<T> held[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const std::int32_t v = min(next + j * stride, vectors - 1);
        held[j] = *reinterpret_cast<const Vector<T>*>(logits + std::int64_t{v} * kVector);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const std::int32_t v = next + j * stride;
        if (v >= vectors) break;
#pragma unroll
        for (int i = 0; i < kVector; ++i) body(to_float(held[j].values[i]), v * kVector + i);
      }
    }
#pragma unroll 1
    for (std::int32_t id = vectors * kVector + first; id < vocabulary; id += stride) {
      body(to_float(logits[id]), id);
    }
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
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (count(middle) >= wanted ? low : high) = middle;
  }
  return low;
}

// Largest first. `size` is a power of two.
__device__ void sort(Entry* list, int size) {
  bool in_warp = false;  // the step before kept to entries of the same warp
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      if (in_warp && step < 32) {
        __syncwarp();
      } else {
        __syncthreads();
      }
      in_warp = step < 32;
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

// The parts of a share are 8 lanes apart: the eight shares of a warp lie side by side.
template <typename T>
__global__ void __launch_bounds__(kPartThreads)
    shares_kernel(const T* logits, std::int32_t vocabulary, std::int32_t vectors,
                  const float* temperatures, Share* shares) {
  constexpr int kApart = 32 / kParts;
  constexpr int kAtOnce = 3;
  start_next();
  wait_for_previous();
  const std::int64_t row = blockIdx.x / kPartBlocks;
  const int thread = static_cast<int>(blockIdx.x % kPartBlocks * kPartThreads + threadIdx.x);
  const int part = thread % 32 / kApart;
  const int share = thread / 32 * kApart + thread % kApart;
  const Row<T> mine{logits + row * vocabulary, vocabulary, vectors};
  const auto visit = [&](auto&& body) {
    mine.template visit<kAtOnce>(share + part * kShares, kParts * kShares, body);
  };
  const auto combine = [](auto value, auto&& of_two) {
#pragma unroll
    for (int lane = kApart; lane < 32; lane *= 2) {
      value = of_two(value, __shfl_xor_sync(0xffffffff, value, lane));
    }
    return value;
  };
  const auto larger = [](int a, int b) { return max(a, b); };
  const auto smaller = [](int a, int b) { return min(a, b); };
  const auto sum = [](auto a, auto b) { return a + b; };

  Share result{.best = order_of<T>(-INFINITY), .allowed = 0, .broken = INT_MAX, .weight = 0};
  visit([&](float logit, std::int32_t id) {
    if (isnan(logit) || logit == INFINITY) result.broken = min(result.broken, id);
    result.best = max(result.best, order_of<T>(logit));
    result.allowed += logit > -INFINITY ? 1 : 0;
  });
  result.best = combine(result.best, larger);
  result.allowed = combine(result.allowed, sum);
  result.broken = combine(result.broken, smaller);
  const float temperature = temperatures[row];
  if (temperature > 0) {  // of the whole row, so of every lane
    const float largest = logit_of<T>(result.best);
    const float log2_scale = log2_scale_of(temperature);
    visit([&](float logit, std::int32_t) {
      if (logit > -INFINITY) result.weight += exp2f((logit - largest) * log2_scale);
    });
    result.weight = combine(result.weight, sum);
  }
  if (part == 0) shares[row * kShares + share] = result;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    top_logits_kernel(const T* logits, std::int32_t vocabulary, std::int32_t vectors,
                      const float* temperatures, const Share* shares, TopLogits* out) {
  constexpr int kAtOnce = 5;
  __shared__ Entry list[kListed];
  __shared__ int listed;
  __shared__ int broken;
  __shared__ int highest;
  start_next();
  if (threadIdx.x == 0) {
    listed = 0;
    broken = INT_MAX;
    highest = 0;
  }
  wait_for_previous();
  const Row<T> row{logits + std::int64_t{blockIdx.x} * vocabulary, vocabulary, vectors};
  TopLogits& result = out[blockIdx.x];
  const int forbidden = order_of<T>(-INFINITY);
  const Share share = shares[std::int64_t{blockIdx.x} * kShares + threadIdx.x];
  const auto visit_share = [&](auto&& body) {
    row.template visit<kAtOnce>(threadIdx.x, kShares, body);
  };

  const int allowed = block_sum(share.allowed);  // its barriers also show the three numbers above
  const int highest_of_warp = __reduce_max_sync(0xffffffff, share.best);
  if (threadIdx.x % 32 == 0) atomicMax(&highest, highest_of_warp);
  if (share.broken != INT_MAX) atomicMin(&broken, share.broken);
  __syncthreads();
  const int wanted = min(allowed, TopLogits::kMost);
  if (broken != INT_MAX || wanted == 0) {  // the same in every thread
    if (threadIdx.x == 0) {
      result.weight = 0;
      result.count = 0;
      result.broken = broken != INT_MAX ? broken : -1;
    }
    return;
  }
  const auto shares_from = [&](std::int64_t x) {
    return __syncthreads_count(share.best >= x ? 1 : 0);
  };
  const int floor_order =
      max(forbidden + 1, static_cast<int>(bisect(forbidden, highest + 1, wanted, shares_from)));

  if (share.best >= floor_order) {
    visit_share([&](float logit, std::int32_t id) {
      const int order = order_of<T>(logit);
      if (order < floor_order) return;
      const int at = atomicAdd(&listed, 1);
      if (at < kListed) list[at] = entry_of(order, id);
    });
  }
  const float temperature = temperatures[blockIdx.x];
  double weight = 0;
  if (temperature > 0) {
    const float lower = logit_of<T>(share.best) - logit_of<T>(highest);
    weight = block_sum(share.allowed == 0 ? 0.0
                                          : static_cast<double>(share.weight) *
                                                exp2f(lower * log2_scale_of(temperature)));
  }
  __syncthreads();

  if (listed > kListed) {
    const auto row_from = [&](std::int64_t x) {
      int count = 0;
      visit_share([&](float logit, std::int32_t) { count += order_of<T>(logit) >= x ? 1 : 0; });
      return block_sum(count);
    };
    const int value = static_cast<int>(bisect(floor_order, highest + 1, wanted, row_from));
    const int above = row_from(value + 1);
    const auto equals_from = [&](std::int64_t x) {  // with ids up to vocabulary - x
      int count = 0;
      visit_share([&](float logit, std::int32_t id) {
        count += order_of<T>(logit) == value && id <= vocabulary - x ? 1 : 0;
      });
      return block_sum(count);
    };
    const std::int64_t last_id =
        vocabulary - bisect(1, vocabulary + 1, wanted - above, equals_from);
    if (threadIdx.x == 0) listed = 0;
    __syncthreads();
    visit_share([&](float logit, std::int32_t id) {
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
