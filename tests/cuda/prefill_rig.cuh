// SPDX-License-Identifier: Apache-2.0
//
// One batch with its cache in device memory, for programs that call a CUDA column's prefill cells
// by themselves: random keys with topics, pooled as compress does, in shuffled pages; whatever
// nobody wrote is NaN, and table entries behind a sequence's last page are out of range.
//
//   const Rig<__nv_bfloat16> rig(Case{.heads_kv = 2, .group = 16, .dim = 128, .spans = {{0,
//   700}}}); must(sm80::attend(backend, rig.attend_params(o.data(), lse.data(), nullptr), {}));
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "infllm/backend/cuda/page.cuh"
#include "infllm/ops/attend.h"
#include "infllm/ops/score.h"
#include "infllm/ops/select.h"
#include "tests/cuda/array.h"

namespace infllm::cuda {

struct Random {
  std::uint64_t state;
  std::uint64_t bits() {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
  }
  int below(int n) { return static_cast<int>(bits() % static_cast<std::uint64_t>(n)); }
  // The sum of four uniform numbers, variance 1.
  float normal() {
    const std::uint64_t x = bits();
    const auto part = [&](int shift) { return static_cast<int>(x >> shift & 0xffff); };
    return static_cast<float>(part(0) + part(16) + part(32) + part(48) - 2 * 65535) * 1.7320508f /
           65536;
  }
};

struct Span {
  int first, end;
  bool sparse = true;
};

struct Case {
  std::string name;
  SparseConfig config;
  int heads_kv, group, dim;
  DType dtype = DType::kBF16;
  std::vector<Span> spans;
  float correlation = 0;  // of neighbouring queries
  float query_scale = 2;
  bool missing_pages = false;
};

template <typename T>
struct Rig {
  explicit Rig(const Case& which)
      : c(which),
        layout{.dtype = c.dtype, .kv_heads = c.heads_kv, .head_dim = c.dim, .config = c.config},
        map(layout) {
    std::vector<int> starts = {0}, lengths;
    std::vector<std::uint8_t> sparse;
    int longest = 0, blocks = 0;
    for (const Span& s : c.spans) {
      starts.push_back(starts.back() + s.end - s.first);
      lengths.push_back(s.end);
      sparse.push_back(s.sparse);
      batch.any_sparse |= s.sparse;
      batch.max_query_length = std::max(batch.max_query_length, s.end - s.first);
      longest = std::max(longest, s.end);
      blocks += (s.end + 63) / 64;
    }
    batch.num_sequences = static_cast<int>(c.spans.size());
    batch.num_tokens = starts.back();
    batch.max_kv_length = longest;
    batch.max_pages = (longest + 63) / 64 + 2;
    pages.num_pages = blocks + 3;
    pages.page_bytes = map.bytes();
    pages.layout = layout;
    fill();
    query_start = std::make_unique<Array<int>>(starts);
    kv_length = std::make_unique<Array<int>>(lengths);
    sparse_flags = std::make_unique<Array<std::uint8_t>>(sparse);
    page_table = std::make_unique<Array<int>>(table);
    batch.query_start = query_start->data();
    batch.kv_length = kv_length->data();
    batch.sparse = sparse_flags->data();
    batch.page_table = page_table->data();
    pages.data = page_memory->data();
  }

  // Keys with topics of 16 tokens, pooled as compress does; whatever nobody wrote is NaN.
  void fill() {
    Random random{0x9e3779b97f4a7c15ull};
    std::vector<std::byte> memory(static_cast<std::size_t>(pages.num_pages) * map.bytes(),
                                  std::byte{0xff});
    std::vector<int> order(pages.num_pages);
    std::iota(order.begin(), order.end(), 0);
    for (int i = pages.num_pages - 1; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
    table.assign(std::size_t(batch.num_sequences) * batch.max_pages, INT32_MAX);
    std::vector<float> sums;
    for (int s = 0; s < batch.num_sequences; ++s) {
      const int length = c.spans[s].end;
      for (int b = 0; b * 64 < length; ++b) {
        table[s * batch.max_pages + b] = order.back();
        order.pop_back();
      }
      const auto row = [&](std::int64_t position, std::int64_t offset, int index) {
        const int page = table[s * batch.max_pages + position];
        return reinterpret_cast<T*>(memory.data() + page * map.bytes() + offset) + index * c.dim;
      };
      for (int h = 0; h < c.heads_kv; ++h) {
        sums.assign((length / 16 + 1) * std::size_t(c.dim), 0);  // of 16 keys
        std::vector<float> topic(c.dim);
        for (int t = 0; t < length; ++t) {
          T* k = row(t / 64, map.key(h), t % 64);
          T* v = row(t / 64, map.value(h), t % 64);
          for (int d = 0; d < c.dim; ++d) {
            if (t % 16 == 0) topic[d] = 0.7745967f * random.normal();
            k[d] = T(topic[d] + 0.6324555f * random.normal());
            v[d] = T(random.normal());
            sums[t / 16 * c.dim + d] += float(k[d]);
          }
        }
        const auto pool = [&](T* to, int first, int count) {
          for (int d = 0; d < c.dim; ++d) {
            float sum = 0;
            for (int i = 0; i < count; ++i) sum += sums[(first + i) * c.dim + d];
            to[d] = T(sum / float(16 * count));
          }
        };
        for (int j = 0; j < fine_windows(length); ++j) pool(row(j / 4, map.fine(h), j % 4), j, 2);
        for (int m = 0; m < coarse_windows(length); ++m) pool(row(m, map.coarse(h), 0), 4 * m, 8);
      }
      if (!c.missing_pages) continue;
      for (int b = 1; b * 64 < length; b += 3)
        table[s * batch.max_pages + b] = b % 2 ? -5 : 1 << 30;
    }
    const std::int64_t width = std::int64_t{c.heads_kv} * c.group * c.dim;
    std::vector<float> last(width);
    for (float& x : last) x = random.normal();
    queries.resize(batch.num_tokens * width);
    const float fresh = std::sqrt(1 - c.correlation * c.correlation);
    for (std::size_t i = 0; i < queries.size(); ++i) {
      float& x = last[i % width];
      x = c.correlation * x + fresh * random.normal();
      queries[i] = T(c.query_scale * x);
    }
    q = std::make_unique<Array<T>>(queries);
    page_memory = std::make_unique<Array<std::byte>>(memory);
    host_pages = std::move(memory);
  }

  // Rows of the host's copy; null where the page is missing.
  const T* row(int s, std::int64_t block, std::int64_t offset, int index) const {
    const int page = table[s * batch.max_pages + block];
    if (page < 0 || page >= pages.num_pages) return nullptr;
    return reinterpret_cast<const T*>(host_pages.data() + page * map.bytes() + offset) +
           index * c.dim;
  }
  float scale() const { return 1 / std::sqrt(float(c.dim)); }
  int heads_q() const { return c.heads_kv * c.group; }

  ScoreParams score_params(float* scores) const {
    return {.pages = pages,
            .batch = batch,
            .config = c.config,
            .heads_q = heads_q(),
            .scale = scale(),
            .q = q->data(),
            .scores = scores};
  }
  SelectParams select_params(const float* scores, int* selection) const {
    return {.batch = batch,
            .config = c.config,
            .heads_kv = c.heads_kv,
            .scores = scores,
            .selection = selection};
  }
  AttendParams attend_params(T* o, float* lse, const int* selection) const {
    return {.pages = pages,
            .batch = batch,
            .heads_q = heads_q(),
            .scale = scale(),
            .q = q->data(),
            .o = o,
            .lse = lse,
            .selection = selection,
            .columns = selection == nullptr ? 0 : select_params(nullptr, nullptr).columns()};
  }

  Case c;
  KvLayout layout;
  PageMap map;
  Batch batch;
  KvPages pages;
  std::vector<int> table;
  std::vector<T> queries;
  std::vector<std::byte> host_pages;
  std::unique_ptr<Array<int>> query_start, kv_length, page_table;
  std::unique_ptr<Array<std::uint8_t>> sparse_flags;
  std::unique_ptr<Array<std::byte>> page_memory;
  std::unique_ptr<Array<T>> q;
};

}  // namespace infllm::cuda
