// SPDX-License-Identifier: Apache-2.0
//
// One case of attention on the card: pages, a batch, queries and a selection, all made of numbers
// that a hash of their place gives, so that the host can compute any row of a case that only the
// device holds. Pages are shuffled and memory that nobody wrote is NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "infllm/backend/cuda/page.cuh"
#include "infllm/ops/attend.h"
#include "tests/cuda/array.h"

namespace infllm::cuda::testing {

// About normal: the sum of four uniform numbers.
__host__ __device__ inline float number(std::uint64_t kind, std::uint64_t index) {
  std::uint64_t x = index * 0x9E3779B97F4A7C15ull + kind * 0xD1B54A32D192ED03ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  x ^= x >> 31;
  const int sum =
      static_cast<int>((x & 0xffff) + (x >> 16 & 0xffff) + (x >> 32 & 0xffff) + (x >> 48));
  return (static_cast<float>(sum) / 65536.0f - 2.0f) * 1.7320508f;
}
enum Kind : std::uint64_t { kQuery = 1, kKey = 2, kValue = 3, kFixed = 4, kMoving = 5 };

template <typename T>
__host__ __device__ inline T stored(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}
template <typename T>
double as_double(T x) {
  return static_cast<double>(static_cast<float>(x));
}
template <typename T>
double rounded(double x) {
  return as_double(stored<T>(static_cast<float>(x)));
}

struct SequenceCase {
  int history = 0;
  int tokens = 0;
  bool sparse = false;
};

struct Case {
  std::string name;
  int heads_kv = 2;
  int group = 16;
  int dim = 128;
  int columns = 0;  // 0: no selection
  std::vector<SequenceCase> sequences;
  bool hostile = false;  // selections with -1 only, out of range or in the future; absent pages
};

constexpr std::int64_t kLongest = std::int64_t{1} << 22;  // tokens of a sequence, for place numbers

__host__ __device__ inline std::int64_t place(int sequence, int heads, int head,
                                              std::int64_t position, int dim, int d) {
  return ((std::int64_t{sequence} * heads + head) * kLongest + position) * dim + d;
}

template <typename T>
__global__ void fill_rows(T* rows, std::uint64_t kind, std::int64_t count, float scale) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    rows[i] = stored<T>(scale * number(kind, static_cast<std::uint64_t>(i)));
  }
}

template <typename T>
__global__ void fill_pages(PagePool pool, const std::int32_t* table, int sequence, int length,
                           int dim) {
  const int block = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  const int page = table[block];
  if (page < 0 || page >= pool.num_pages) return;
  T* keys = pool.plane<T>(page, pool.map.key(head));
  T* values = pool.plane<T>(page, pool.map.value(head));
  for (int i = static_cast<int>(threadIdx.x); i < kPageTokens * dim; i += blockDim.x) {
    const int position = block * kPageTokens + i / dim;
    if (position >= length) continue;
    const auto at =
        static_cast<std::uint64_t>(place(sequence, pool.map.heads, head, position, dim, i % dim));
    keys[i] = stored<T>(number(kKey, at));
    values[i] = stored<T>(number(kValue, at));
  }
}

// Rows of 96 blocks: sink, the own block and 32 before, and the best of the rest by a score that is
// half a property of the block and half a process with memory rho over the tokens; rho < 0 draws
// afresh. A thread block walks 256 tokens.
constexpr int kBudget = 96;
constexpr int kLocal = 33;
constexpr int kFree = kBudget - kLocal - 1;
__global__ void __launch_bounds__(256)
    draw_selection(std::int32_t* selection, int tokens, float rho) {
  extern __shared__ float moving[];
  __shared__ int counts[8];
  const int head = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int first = static_cast<int>(blockIdx.x) * 256;
  for (int token = first; token < min(tokens, first + 256); ++token) {
    const int own = token / kPageTokens;
    std::int32_t* row = selection + (std::int64_t{head} * tokens + token) * kBudget;
    const int free_blocks = own - kLocal;  // 1 .. own - kLocal are candidates
    for (int b = thread; b <= (first + 255) / kPageTokens; b += 256) {
      const auto at = (static_cast<std::uint64_t>(head) * 65536 + b) * 4194304 + token;
      const float fresh = number(kMoving, at);
      if (rho < 0 || token == first) {
        moving[b] = fresh;
      } else {
        moving[b] = rho * moving[b] + sqrtf(1 - rho * rho) * fresh;
      }
    }
    if (own + 1 <= kBudget) {
      for (int i = thread; i < kBudget; i += 256) row[i] = i <= own ? i : -1;
      __syncthreads();
      continue;
    }
    const auto score = [&](int b) {
      if (rho < 0) return moving[b];
      return number(kFixed, static_cast<std::uint64_t>(head) * 65536 + b) + moving[b];
    };
    float low = -10, high = 10, cut = 0;
    for (int i = 0; i < 40; ++i) {
      cut = (low + high) / 2;
      int mine = 0;
      for (int b = 1 + thread; b <= free_blocks; b += 256) mine += score(b) > cut;
      mine = __reduce_add_sync(0xffffffff, mine);
      __syncthreads();
      if (lane == 0) counts[thread / 32] = mine;
      __syncthreads();
      int all = 0;
      for (int w = 0; w < 8; ++w) all += counts[w];
      if (all == kFree) break;
      (all > kFree ? low : high) = cut;
    }
    int written = 1;
    for (int base = 1; base <= free_blocks; base += 256) {
      const int b = base + thread;
      const bool in = b <= free_blocks && score(b) > cut;
      const unsigned ballot = __ballot_sync(0xffffffff, in);
      __syncthreads();
      if (lane == 0) counts[thread / 32] = __popc(ballot);
      __syncthreads();
      int at = written + __popc(ballot & ((1u << lane) - 1));
      for (int w = 0; w < 8; ++w) {
        if (w < thread / 32) at += counts[w];
        written += counts[w];
      }
      if (in && at <= kFree) row[at] = b;
    }
    written = min(written, kFree + 1);
    if (thread == 0) row[0] = 0;
    for (int i = thread; i < kLocal; i += 256) row[written + i] = own - kLocal + 1 + i;
    for (int i = written + kLocal + thread; i < kBudget; i += 256) row[i] = -1;
    __syncthreads();
  }
}

// A case on the device.
template <typename T>
struct Bed {
  explicit Bed(const Case& c, float query_scale = 1) : test(c) {
    std::mt19937 random(7);
    starts = {0};
    int longest = 0;
    for (const SequenceCase& s : c.sequences) {
      starts.push_back(starts.back() + s.tokens);
      lengths.push_back(s.history + s.tokens);
      sparse.push_back(s.sparse ? 1 : 0);
      longest = std::max(longest, lengths.back());
      params.batch.max_query_length = std::max(params.batch.max_query_length, s.tokens);
      params.batch.any_sparse = params.batch.any_sparse || s.sparse;
    }
    const int row = (longest + kPageTokens - 1) / kPageTokens + 1;
    table.assign(c.sequences.size() * static_cast<std::size_t>(row), 1 << 30);
    int pages = 3;
    for (std::size_t b = 0; b < c.sequences.size(); ++b) pages += (lengths[b] + 63) / 64;
    std::vector<int> order(static_cast<std::size_t>(pages));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    int taken = 0;
    for (std::size_t b = 0; b < c.sequences.size(); ++b) {
      for (int i = 0; i < (lengths[b] + 63) / 64; ++i) {
        table[b * static_cast<std::size_t>(row) + static_cast<std::size_t>(i)] =
            order[static_cast<std::size_t>(taken++)];
      }
    }
    for (std::size_t b = 0; b < c.sequences.size() && c.hostile; ++b) {
      if (lengths[b] <= 2 * kPageTokens) continue;
      table[b * static_cast<std::size_t>(row) + 1] = -7;
      table[b * static_cast<std::size_t>(row) + 2] = pages + 5;
    }
    tokens = starts.back();
    KvLayout layout;
    layout.dtype = std::is_same_v<T, __half> ? DType::kF16 : DType::kBF16;
    layout.kv_heads = c.heads_kv;
    layout.head_dim = c.dim;
    params.pages.layout = layout;
    params.pages.num_pages = pages;
    params.pages.page_bytes = PageMap(layout).bytes();
    const std::int64_t bytes = params.pages.page_bytes * pages;
    memory = std::make_unique<Array<std::byte>>(bytes);
    must(cudaMemset(memory->data(), 0xff, static_cast<std::size_t>(bytes)));  // read, but masked
    params.pages.data = memory->data();
    d_starts = std::make_unique<Array<std::int32_t>>(starts);
    d_lengths = std::make_unique<Array<std::int32_t>>(lengths);
    d_table = std::make_unique<Array<std::int32_t>>(table);
    d_sparse = std::make_unique<Array<std::uint8_t>>(sparse);
    params.batch.num_sequences = static_cast<std::int32_t>(c.sequences.size());
    params.batch.num_tokens = tokens;
    params.batch.query_start = d_starts->data();
    params.batch.kv_length = d_lengths->data();
    params.batch.page_table = d_table->data();
    params.batch.max_pages = row;
    params.batch.sparse = d_sparse->data();
    params.batch.max_kv_length = longest;
    const PagePool pool(params.pages);
    for (std::size_t b = 0; b < c.sequences.size(); ++b) {
      const auto blocks = static_cast<unsigned>((lengths[b] + 63) / 64);
      if (blocks == 0) continue;
      fill_pages<T><<<dim3(blocks, static_cast<unsigned>(c.heads_kv)), 256>>>(
          pool, d_table->data() + b * static_cast<std::size_t>(row), static_cast<int>(b),
          lengths[b], c.dim);
    }
    const std::int64_t elements = std::int64_t{tokens} * heads() * c.dim;
    q = std::make_unique<Array<T>>(elements);
    o = std::make_unique<Array<T>>(elements);
    lse = std::make_unique<Array<float>>(std::int64_t{tokens} * heads());
    fill_rows<T><<<1024, 256>>>(q->data(), kQuery, elements, query_scale);
    must(cudaGetLastError());
    params.heads_q = heads();
    params.scale = 1 / std::sqrt(static_cast<float>(c.dim));
    params.q = q->data();
    params.o = o->data();
    params.lse = lse->data();
    scale_of_q = query_scale;
    if (c.columns > 0) choose(random);
    must(cudaDeviceSynchronize());
  }

  int heads() const { return test.heads_kv * test.group; }

  // Any blocks at all, in ascending order.
  void choose(std::mt19937& random) {
    selection.assign(
        static_cast<std::size_t>(test.heads_kv) * static_cast<std::size_t>(tokens * test.columns),
        -1);
    for (int h = 0; h < test.heads_kv; ++h) {
      for (std::size_t b = 0; b < test.sequences.size(); ++b) {
        for (int i = 0; i < test.sequences[b].tokens; ++i) {
          const int own = (test.sequences[b].history + i) / kPageTokens;
          std::int32_t* row =
              selection.data() +
              (static_cast<std::int64_t>(h) * tokens + starts[b] + i) * test.columns;
          if (test.hostile && random() % 5 == 0) continue;
          int used = 0;
          const int want = static_cast<int>(random() % static_cast<unsigned>(test.columns)) + 1;
          for (int block = 0; block <= own && used < want; ++block) {
            const bool must_take = own - block < want - used;
            if (must_take || random() % 3 == 0) row[used++] = block;
          }
          if (test.hostile && used + 1 < test.columns) {
            row[used++] = own + 1 + static_cast<int>(random() % 3);
            if (used < test.columns) row[used++] = 1 << 20;
          }
        }
      }
    }
    d_selection = std::make_unique<Array<std::int32_t>>(selection);
    params.selection = d_selection->data();
    params.columns = test.columns;
  }

  // The released budget on one sequence.
  void draw(float rho) {
    const std::size_t shared = static_cast<std::size_t>((tokens + 63) / 64 + 4) * sizeof(float);
    must(cudaFuncSetAttribute(draw_selection, cudaFuncAttributeMaxDynamicSharedMemorySize, 131072));
    d_selection =
        std::make_unique<Array<std::int32_t>>(std::int64_t{test.heads_kv} * tokens * kBudget);
    draw_selection<<<dim3(static_cast<unsigned>((tokens + 255) / 256),
                          static_cast<unsigned>(test.heads_kv)),
                     256, shared>>>(d_selection->data(), tokens, rho);
    must(cudaDeviceSynchronize());
    params.selection = d_selection->data();
    params.columns = kBudget;
  }

  void poison() {
    o->poison();
    lse->poison();
  }

  Case test;
  AttendParams params;
  int tokens = 0;
  float scale_of_q = 1;
  std::vector<std::int32_t> starts, lengths, table, selection;
  std::vector<std::uint8_t> sparse;
  std::unique_ptr<Array<std::byte>> memory;
  std::unique_ptr<Array<std::int32_t>> d_starts, d_lengths, d_table, d_selection;
  std::unique_ptr<Array<std::uint8_t>> d_sparse;
  std::unique_ptr<Array<T>> q, o;
  std::unique_ptr<Array<float>> lse;
};

}  // namespace infllm::cuda::testing
