// SPDX-License-Identifier: Apache-2.0
//
// One step of score_select on the device, of a shape that may be large: pooled keys with topics in
// shuffled pages and queries that resemble their neighbours, made on the device. Memory that nobody
// wrote is NaN, table entries behind a sequence's last page are out of range.
//
//   Step<__nv_bfloat16> step({.config = config, .lengths = {9001}, .tokens = {500}});
//   const std::vector<std::int32_t> selection = step.select();
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/page.cuh"
#include "infllm/backend/cuda/sm90/score_select.h"
#include "tests/cuda/array.h"

namespace infllm::cuda {

// As printf; nvcc cannot compile {fmt}.
inline std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

enum class Content { kNatural, kZero, kTies, kExtreme };

struct Case {
  std::string name;
  SparseConfig config;
  int heads_kv = 2;
  int group = 16;
  int dim = 128;
  DType dtype = DType::kBF16;
  std::vector<int> lengths;  // of each sequence
  std::vector<int> tokens;   // of this step
  std::vector<int> sparse;   // empty: all
  Content content = Content::kNatural;
  float correlation = 0;  // of neighbouring queries
  int samples = 400;      // rows that are judged
};

__device__ inline float noise(std::uint64_t seed, std::uint64_t index) {
  const auto mix = [](std::uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9ull;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebull;
    return x ^ x >> 31;
  };
  const std::uint64_t x = mix(index * 0x9e3779b97f4a7c15ull + mix(seed + 0x1234567));
  const float u = (static_cast<float>(static_cast<std::uint32_t>(x) >> 8) + 0.5f) / 16777216;
  const float v = static_cast<float>(static_cast<std::uint32_t>(x >> 32) >> 8) / 16777216;
  return sqrtf(-2 * logf(u)) * cospif(2 * v);
}

// The mean of 16 keys: a topic and what is left of the keys' noise.
__device__ inline float chunk_mean(int sequence, int head, int chunk, int d, Content content) {
  if (content == Content::kTies) chunk %= kFineRows;
  const std::uint64_t at = ((static_cast<std::uint64_t>(sequence) * 64 + head) << 32) + chunk;
  return 0.7745967f * noise(1, at * 128 + d) + 0.1581139f * noise(2, at * 128 + d);
}

template <typename T>
__global__ void fill_pages(PagePool pool, Batch batch, int dim, Content content) {
  const Sequence sequence(batch, static_cast<int>(blockIdx.y));
  const int block = static_cast<int>(blockIdx.x);
  if (block >= sequence.blocks()) return;
  const int page = sequence.page(block, pool.num_pages);
  for (int i = static_cast<int>(threadIdx.x); i < pool.map.heads * dim; i += blockDim.x) {
    const int head = i / dim;
    const int d = i % dim;
    float u[11];
    for (int c = 0; c < 11; ++c) {
      u[c] = chunk_mean(static_cast<int>(blockIdx.y), head, 4 * block + c, d, content);
    }
    for (int row = 0; row < kFineRows; ++row) {
      const bool there = block * kFineRows + row < fine_windows(sequence.length);
      pool.plane<T>(page, pool.map.fine(head))[row * dim + d] =
          static_cast<T>(there ? (u[row] + u[row + 1]) / 2 : NAN);
    }
    float sum = 0;
    for (int c = 0; c < 8; ++c) sum += u[c] / 8;
    pool.plane<T>(page, pool.map.coarse(head))[d] =
        static_cast<T>(block < coarse_windows(sequence.length) ? sum : NAN);
  }
}

// Chunks of tokens begin anew; within one, a query is `keep` times the one before and noise.
constexpr int kQueryChunk = 512;
template <typename T>
__global__ void fill_queries(T* q, std::int64_t tokens, int width, float scale, float keep) {
  const int column = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (column >= width) return;
  const std::int64_t first = std::int64_t{blockIdx.y} * kQueryChunk;
  const float fresh = sqrtf(1 - keep * keep);
  float x = noise(3, (first << 20) + column);
  for (std::int64_t t = first; t < min(tokens, first + kQueryChunk); ++t) {
    if (t > first) x = keep * x + fresh * noise(4, (t << 20) + column);
    q[t * width + column] = static_cast<T>(scale * x);
  }
}

// One step of one layer on the device.
template <typename T>
class Step {
 public:
  explicit Step(const Case& c) : case_(c), state_(std::make_shared<Device>()) {
    state_->capability = 90;
    must(cudaDeviceGetAttribute(&state_->sm_count, cudaDevAttrMultiProcessorCount, 0));
    backend_.name = "cuda:0:sm90";
    backend_.state = state_;
    const int count = static_cast<int>(c.lengths.size());
    std::vector<std::int32_t> starts = {0};
    std::int64_t pages = 0;
    for (int b = 0; b < count; ++b) {
      starts.push_back(starts.back() + c.tokens[b]);
      pages += c.config.blocks_in(c.lengths[b]);
    }
    const int longest = *std::max_element(c.lengths.begin(), c.lengths.end());
    const auto max_pages = static_cast<int>(c.config.blocks_in(longest)) + 1;
    std::vector<std::int32_t> order(pages);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(1));
    std::vector<std::int32_t> table(static_cast<std::size_t>(count) * max_pages, 1 << 30);
    for (int b = 0, next = 0; b < count; ++b) {
      for (int i = 0; i < c.config.blocks_in(c.lengths[b]); ++i) {
        table[static_cast<std::size_t>(b) * max_pages + i] = order[next++];
      }
    }
    std::vector<std::uint8_t> sparse(count, 1);
    for (std::size_t b = 0; b < c.sparse.size(); ++b) sparse[b] = c.sparse[b] != 0;
    starts_ = starts;
    starts_memory_ = Array(starts);
    lengths_memory_ = Array(std::vector<std::int32_t>(c.lengths.begin(), c.lengths.end()));
    table_memory_ = Array(table);
    sparse_memory_ = Array(sparse);
    batch_ = {.num_sequences = count,
              .num_tokens = starts.back(),
              .query_start = starts_memory_.data(),
              .kv_length = lengths_memory_.data(),
              .page_table = table_memory_.data(),
              .max_pages = max_pages,
              .sparse = sparse_memory_.data(),
              .any_sparse = true,
              .max_query_length = *std::max_element(c.tokens.begin(), c.tokens.end()),
              .max_kv_length = longest};
    KvLayout layout{
        .dtype = c.dtype, .kv_heads = c.heads_kv, .head_dim = c.dim, .config = c.config};
    const std::int64_t page_bytes = PageMap(layout).bytes();
    page_memory_ = Array<std::byte>(static_cast<std::size_t>(pages * page_bytes));
    must(cudaMemset(page_memory_.data(), 0xff, page_memory_.size()));
    pages_ = {page_memory_.data(), layout, page_bytes, static_cast<std::int32_t>(pages)};
    fill_pages<T><<<dim3(max_pages, count), 256>>>(PagePool(pages_), batch_, c.dim, c.content);

    const int width = c.heads_kv * c.group * c.dim;
    q_ = Array<T>(static_cast<std::size_t>(batch_.num_tokens) * width);
    const float spread = c.content == Content::kZero ? 0 : c.content == Content::kExtreme ? 200 : 2;
    fill_queries<T>
        <<<dim3((width + 127) / 128, (batch_.num_tokens + kQueryChunk - 1) / kQueryChunk), 128>>>(
            q_.data(), batch_.num_tokens, width, spread, c.correlation);
    must(cudaDeviceSynchronize());
    scale_ = 1 / std::sqrt(static_cast<float>(c.dim));
    params_ = {.score = {.pages = pages_,
                         .batch = batch_,
                         .config = c.config,
                         .heads_q = c.heads_kv * c.group,
                         .scale = scale_,
                         .q = q_.data()},
               .select = {.batch = batch_, .config = c.config, .heads_kv = c.heads_kv}};
    selection_ =
        Array<std::int32_t>(static_cast<std::size_t>(c.heads_kv) * batch_.num_tokens * columns());
    params_.select.selection = selection_.data();
    workspace_ = Array<std::byte>(workspace_bytes());
  }

  int columns() const { return params_.select.columns(); }
  std::size_t workspace_bytes() const { return sm90::score_select_bytes(backend_, params_); }
  bool covered() const { return sm90::score_selects(backend_, params_); }

  void launch() {
    must(sm90::score_select(backend_, params_, {workspace_.data(), workspace_.size()}));
  }
  // What the last launch selected.
  std::vector<std::int32_t> selection() const { return selection_.host(); }
  std::vector<std::int32_t> select() {
    must(cudaMemset(selection_.data(), 0x55, selection_.size() * 4));
    launch();
    must(cudaDeviceSynchronize());
    return selection_.host();
  }

  // Milliseconds of warm launches, ascending.
  std::vector<float> measure() {
    for (int i = 0; i < 2; ++i) launch();
    cudaEvent_t from, to;
    must(cudaEventCreate(&from));
    must(cudaEventCreate(&to));
    std::vector<float> times;
    float total = 0;
    while (times.size() < 3 || (times.size() < 15 && total < 150)) {
      cudaEventRecord(from);
      launch();
      cudaEventRecord(to);
      must(cudaEventSynchronize(to));
      float ms = 0;
      cudaEventElapsedTime(&ms, from, to);
      times.push_back(ms);
      total += ms;
    }
    std::sort(times.begin(), times.end());
    return times;
  }

  // The share of a token's free blocks that its neighbour chose too.
  double overlap() {
    const std::vector<std::int32_t> chosen = selection_.host();
    std::int64_t common = 0;
    std::int64_t total = 0;
    const int k = columns();
    for (int t = batch_.num_tokens - 400; t < batch_.num_tokens; ++t) {
      const std::int64_t p = case_.lengths[0] - batch_.num_tokens + t;
      const auto local = static_cast<std::int32_t>(case_.config.first_local_block(p));
      const std::int32_t* a = chosen.data() + std::int64_t{t} * k;
      for (int i = case_.config.init_blocks; i < k && a[i] >= 0 && a[i] < local; ++i) {
        ++total;
        common += std::binary_search(a - k, a - k + case_.config.topk, a[i]);
      }
    }
    return total == 0 ? 1 : static_cast<double>(common) / static_cast<double>(total);
  }

  const Case& test_case() const { return case_; }
  const ScoreSelectParams& params() const { return params_; }
  const T* queries() const { return q_.data(); }
  // Of the packed tokens, with the end behind the last.
  const std::vector<std::int32_t>& starts() const { return starts_; }
  // The row of a selection that this step made.
  const std::int32_t* row(const std::vector<std::int32_t>& chosen, int sequence, int head,
                          int position) const {
    const std::int64_t token =
        starts_[sequence] + position - (case_.lengths[sequence] - case_.tokens[sequence]);
    return chosen.data() + (std::int64_t{head} * batch_.num_tokens + token) * columns();
  }

  // The selection of one sequence in a step of its own.
  std::vector<std::int32_t> select_alone(int sequence) {
    const ScoreSelectParams together = params_;
    const Array<std::int32_t> starts(std::vector<std::int32_t>{0, case_.tokens[sequence]});
    Batch one = batch_;
    one.num_sequences = 1;
    one.num_tokens = case_.tokens[sequence];
    one.query_start = starts.data();
    one.kv_length = batch_.kv_length + sequence;
    one.page_table = batch_.page_table + std::int64_t{sequence} * batch_.max_pages;
    one.sparse = batch_.sparse + sequence;
    one.max_query_length = case_.tokens[sequence];
    one.max_kv_length = case_.lengths[sequence];
    params_.score.batch = params_.select.batch = one;
    params_.score.q =
        q_.data() + std::int64_t{starts_[sequence]} * case_.heads_kv * case_.group * case_.dim;
    std::vector<std::int32_t> chosen = select();
    chosen.resize(static_cast<std::size_t>(case_.heads_kv) * one.num_tokens * columns());
    params_ = together;
    return chosen;
  }

 private:
  Case case_;
  std::shared_ptr<Device> state_;
  Backend backend_;
  std::vector<std::int32_t> starts_;
  Array<std::int32_t> starts_memory_, lengths_memory_, table_memory_;
  Array<std::uint8_t> sparse_memory_;
  Batch batch_;
  Array<std::byte> page_memory_, workspace_;
  KvPages pages_;
  Array<T> q_;
  float scale_ = 0;
  ScoreSelectParams params_;
  Array<std::int32_t> selection_;
};

}  // namespace infllm::cuda
