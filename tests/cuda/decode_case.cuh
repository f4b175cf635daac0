// SPDX-License-Identifier: Apache-2.0
//
// A decode step on the device, filled with random numbers: caches of several layers, a batch of one
// token per sequence, outputs full of NaN. Pages are shuffled, what no sequence owns is NaN, and
// page tables end in numbers that no page has.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/backend/cuda/page.cuh"
#include "infllm/ops/attend.h"
#include "infllm/ops/score_select.h"
#include "tests/cuda/must.h"
#include "tests/cuda/poison.h"

namespace infllm::decode_check {

using cuda::must;

enum class Content { kNatural, kZeroQueries, kRepeatedKeys };

struct Shape {
  std::string name;
  std::vector<std::int32_t> lengths;  // 0: the sequence sits this step out
  std::int32_t heads_q = 32, heads_kv = 2, head_dim = 128;
  DType dtype = DType::kBF16;
  SparseConfig config;
  Content content = Content::kNatural;
  bool dense = false;              // nobody is sparse
  std::int32_t layers = 1;         // caches
  std::int32_t max_kv_length = 0;  // host maximum; 0: the longest sequence
  // The table has no page for every so many blocks, but for a sequence's first; 0: it has them all.
  std::int32_t missing = 0;
};

// What a table says where there is no page.
inline constexpr std::int32_t kNoPages[] = {-1, 1 << 30, -(1 << 30)};

template <typename U>
class Array {
 public:
  Array() = default;
  explicit Array(std::size_t count) : count_(count) {
    must(cudaMalloc(&data_, count * sizeof(U) + 16));
    poison();
  }
  explicit Array(const std::vector<U>& from) : Array(from.size()) {
    must(cudaMemcpy(data_, from.data(), from.size() * sizeof(U), cudaMemcpyHostToDevice));
  }
  Array(Array&& other) noexcept { *this = std::move(other); }
  Array& operator=(Array&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~Array() { cudaFree(data_); }

  void poison() { must(cuda::poison(data_, count_ * sizeof(U))); }
  std::vector<U> host() const {
    std::vector<U> to(count_);
    must(cudaMemcpy(to.data(), data_, count_ * sizeof(U), cudaMemcpyDeviceToHost));
    return to;
  }
  U* get() const { return data_; }
  std::size_t size() const { return count_; }

 private:
  U* data_ = nullptr;
  std::size_t count_ = 0;
};

__device__ inline float hashed_normal(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  x ^= x >> 31;
  // Four uniforms of 16 bits: variance 4 / 12 each unit.
  const float sum =
      static_cast<float>((x & 0xffff) + (x >> 16 & 0xffff) + (x >> 32 & 0xffff) + (x >> 48)) /
      65536.0f;
  return (sum - 2.0f) * 1.7320508f;
}

template <typename T>
__global__ void fill(T* to, std::int64_t count, std::uint64_t seed, float scale) {
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < count; i += step) {
    to[i] = cuda::to<T>(scale * hashed_normal(seed * 0x2545f4914f6cdd1dull + i));
  }
}

// Pooled rows as those of a 64-token period, so that blocks tie.
template <typename T>
__global__ void repeat_pooled(cuda::PagePool pool, int elements) {
  T* to = pool.plane<T>(static_cast<int>(blockIdx.x), pool.map.fine(0));
  for (int i = threadIdx.x; i < elements; i += blockDim.x) {
    to[i] = cuda::to<T>(hashed_normal(12345 + i));
  }
}

// NaN in rows of keys, values and windows that do not exist; block (sequence, block).
template <typename T>
__global__ void poison_tail(cuda::PagePool pool, Batch batch, int dim) {
  const cuda::Sequence sequence(batch, static_cast<int>(blockIdx.y));
  const int block = static_cast<int>(blockIdx.x);
  const int page = sequence.page(block, pool.num_pages);
  if (page < 0) return;
  const T nan = cuda::to<T>(__builtin_nanf(""));
  for (int head = 0; head < pool.map.heads; ++head) {
    for (int i = threadIdx.x; i < 64 * dim; i += blockDim.x) {
      if (block * 64 + i / dim < sequence.length) continue;
      pool.plane<T>(page, pool.map.key(head))[i] = nan;
      pool.plane<T>(page, pool.map.value(head))[i] = nan;
    }
    for (int i = threadIdx.x; i < 4 * dim; i += blockDim.x) {
      if (4 * block + i / dim < cuda::fine_windows(sequence.length)) continue;
      pool.plane<T>(page, pool.map.fine(head))[i] = nan;
    }
    for (int i = threadIdx.x; i < dim; i += blockDim.x) {
      if (block < cuda::coarse_windows(sequence.length)) continue;
      pool.plane<T>(page, pool.map.coarse(head))[i] = nan;
    }
  }
}

struct Case {
  explicit Case(const Shape& s) : shape(s) {
    const auto sequences = static_cast<std::int32_t>(s.lengths.size());
    std::vector<std::int32_t> start{0}, lengths;
    std::vector<std::uint8_t> sparse;
    std::int32_t longest = 1, pages = 1;
    for (const std::int32_t length : s.lengths) {
      start.push_back(start.back() + (length > 0 ? 1 : 0));
      lengths.push_back(length > 0 ? length : 77);  // a history without a token in this step
      sparse.push_back(!s.dense && s.config.is_sparse_at(lengths.back()) ? 1 : 0);
      longest = std::max(longest, lengths.back());
      pages += (lengths.back() + 63) / 64;
    }
    tokens = start.back();
    host_start = start;
    host_lengths = lengths;
    host_sparse = sparse;
    const KvLayout layout{
        .dtype = s.dtype, .kv_heads = s.heads_kv, .head_dim = s.head_dim, .config = s.config};
    const std::int64_t page_bytes = cuda::PageMap(layout).bytes();
    memory = Array<std::byte>(static_cast<std::size_t>(page_bytes) * pages * s.layers);

    const std::int32_t max_length = std::max(s.max_kv_length, longest);
    const std::int32_t max_pages = (max_length + 63) / 64 + 3;
    std::vector<std::int32_t> order(pages);
    for (std::int32_t i = 0; i < pages; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), std::mt19937(7));
    host_table.assign(static_cast<std::size_t>(sequences) * max_pages, 1 << 30);
    std::int32_t used = 1;  // the first is nobody's
    for (std::int32_t b = 0; b < sequences; ++b) {
      for (std::int32_t i = 0; i < (lengths[b] + 63) / 64; ++i) {
        std::int32_t& page = host_table[static_cast<std::size_t>(b) * max_pages + i];
        page = order[used++];
        if (s.missing > 0 && i % s.missing == s.missing - 1) page = kNoPages[i / s.missing % 3];
      }
    }
    start_array = Array<std::int32_t>(start);
    length_array = Array<std::int32_t>(lengths);
    table_array = Array<std::int32_t>(host_table);
    sparse_array = Array<std::uint8_t>(sparse);
    batch = {.num_sequences = sequences,
             .num_tokens = tokens,
             .query_start = start_array.get(),
             .kv_length = length_array.get(),
             .page_table = table_array.get(),
             .max_pages = max_pages,
             .sparse = sparse_array.get(),
             .any_sparse = !s.dense,
             .max_query_length = 1,
             .max_kv_length = max_length};
    const std::size_t outputs = static_cast<std::size_t>(tokens) * s.heads_q * s.head_dim;
    q = Array<std::uint16_t>(outputs);
    for (std::int32_t l = 0; l < s.layers; ++l) {
      pools.push_back({memory.get() + page_bytes * pages * l, layout, page_bytes, pages});
    }
    cuda::with_type(s.dtype, [&](auto type) {
      using T = decltype(type);
      fill<<<1024, 256>>>(reinterpret_cast<T*>(q.get()), static_cast<std::int64_t>(outputs), 1,
                          s.content == Content::kZeroQueries ? 0.0f : 1.0f);
      for (const KvPages& layer : pools) {
        const cuda::PagePool pool(layer);
        fill<<<8192, 256>>>(static_cast<T*>(layer.data), page_bytes * pages / 2,
                            2 + static_cast<std::uint64_t>(&layer - pools.data()), 1.0f);
        if (s.content == Content::kRepeatedKeys) {
          repeat_pooled<T><<<pages, 256>>>(pool, 5 * s.head_dim * s.heads_kv);
        }
        poison_tail<T><<<dim3(max_pages, sequences), 256>>>(pool, batch, s.head_dim);
        must(cudaMemset(static_cast<std::byte*>(layer.data) + page_bytes * order[0], 0xff,
                        page_bytes));
      }
      return 0;
    });
    must(cudaDeviceSynchronize());
    o = Array<std::uint16_t>(outputs);
    lse = Array<float>(static_cast<std::size_t>(tokens) * s.heads_q);
    selection =
        Array<std::int32_t>(static_cast<std::size_t>(s.heads_kv) * tokens * select(0).columns());
  }

  SelectParams select(int) const {
    return {.batch = batch,
            .config = shape.config,
            .heads_kv = shape.heads_kv,
            .selection = selection.get()};
  }
  ScoreSelectParams score_select(int layer) const {
    return {.score = {.pages = pools[layer],
                      .batch = batch,
                      .config = shape.config,
                      .heads_q = shape.heads_q,
                      .scale = scale(),
                      .q = q.get()},
            .select = select(layer)};
  }
  // early: the selection comes from score_select just before.
  AttendParams attend(int layer, bool early) const {
    AttendParams p{.pages = pools[layer],
                   .batch = batch,
                   .heads_q = shape.heads_q,
                   .scale = scale(),
                   .q = q.get(),
                   .o = o.get(),
                   .lse = lse.get()};
    if (shape.dense) return p;
    p.selection = selection.get();
    p.columns = select(layer).columns();
    if (early) p.follows_select = &shape.config;
    return p;
  }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(shape.head_dim)); }

  Shape shape;
  std::int32_t tokens = 0;
  std::vector<std::int32_t> host_start, host_lengths, host_table;
  std::vector<std::uint8_t> host_sparse;
  Array<std::byte> memory;
  Array<std::int32_t> start_array, length_array, table_array, selection;
  Array<std::uint8_t> sparse_array;
  Array<std::uint16_t> q, o;
  Array<float> lse;
  Batch batch;
  std::vector<KvPages> pools;
};

}  // namespace infllm::decode_check
