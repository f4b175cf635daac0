// SPDX-License-Identifier: Apache-2.0
//
// Test and benchmark of the Hopper kernel of score_select (infllm/backend/cuda/sm90), by itself.
//
//   score_select_main check          every case; exit status 1 if one fails
//   score_select_main bench [tokens ...]
//
// Selections are judged by value: the scores of a row are computed in double, and in float for the
// error that an honest kernel may make; no block that was left out may beat one that was chosen by
// more than twice that error and an ulp of bf16 (tests/support/grid.h, well_chosen).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/page.cuh"
#include "infllm/backend/cuda/sm90/score_select.h"

namespace infllm::cuda {
namespace {

// As printf; nvcc cannot compile {fmt}.
std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}
void must(const Status& status) {
  if (status.ok()) return;
  std::printf("%s\n", status.message().c_str());
  std::exit(2);
}

template <typename T>
class Array {
 public:
  Array() = default;
  explicit Array(std::size_t count) : count_(count) {
    must(cudaMalloc(&data_, std::max<std::size_t>(count, 1) * sizeof(T)), "cudaMalloc");
  }
  explicit Array(const std::vector<T>& host) : Array(host.size()) {
    must(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyDefault), "copy in");
  }
  Array(Array&& other) noexcept { *this = std::move(other); }
  Array& operator=(Array&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~Array() { cudaFree(data_); }
  T* data() const { return data_; }
  std::size_t size() const { return count_; }
  std::vector<T> host() const {
    std::vector<T> out(count_);
    must(cudaMemcpy(out.data(), data_, count_ * sizeof(T), cudaMemcpyDefault), "copy out");
    return out;
  }

 private:
  T* data_ = nullptr;
  std::size_t count_ = 0;
};

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

__device__ float noise(std::uint64_t seed, std::uint64_t index) {
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
__device__ float chunk_mean(int sequence, int head, int chunk, int d, Content content) {
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

// Scores of single rows, straight from the equations of ops/score.h: S to sums, R to scores.
template <typename Real, typename T>
__global__ void reference_rows(PagePool pool, Batch batch, SparseConfig config, int group, int dim,
                               double scale, const T* q, const int* rows, Real* sums,
                               std::int64_t sums_stride, double* scores, std::int64_t blocks) {
  const int sequence_index = rows[3 * blockIdx.x];
  const int head = rows[3 * blockIdx.x + 1];
  const int position = rows[3 * blockIdx.x + 2];
  const Sequence sequence(batch, sequence_index);
  __shared__ Real query[16 * 128];
  __shared__ Real reduced[256];
  const std::int64_t token = sequence.first_token + position - sequence.first_position();
  for (int i = static_cast<int>(threadIdx.x); i < group * dim; i += blockDim.x) {
    query[i] =
        static_cast<Real>(static_cast<float>(q[(token * pool.map.heads + head) * group * dim + i]));
  }
  __syncthreads();
  const auto logit = [&](int h, const T* key) {
    Real sum = 0;
    for (int d = 0; d < dim; ++d)
      sum += query[h * dim + d] * static_cast<Real>(static_cast<float>(key[d]));
    return static_cast<Real>(scale) * sum;
  };
  const auto fine_key = [&](int j) {
    return pool.plane<const T>(sequence.page(j / 4, pool.num_pages), pool.map.fine(head)) +
           j % 4 * dim;
  };
  const auto coarse_key = [&](int m) {
    return pool.plane<const T>(sequence.page(m, pool.num_pages), pool.map.coarse(head));
  };
  const bool coarse = config.lse_source == LseSource::kCoarse;
  const int visible = fine_windows(position + 1);
  const int count = coarse ? coarse_windows(position + 1) : visible;
  const auto reduce = [&](Real mine, bool maximum) {
    reduced[threadIdx.x] = mine;
    __syncthreads();
    for (int n = 128; n > 0; n /= 2) {
      if (threadIdx.x < n) {
        const Real a = reduced[threadIdx.x];
        const Real b = reduced[threadIdx.x + n];
        reduced[threadIdx.x] = maximum ? max(a, b) : a + b;
      }
      __syncthreads();
    }
    const Real all = reduced[0];
    __syncthreads();
    return all;
  };
  Real* const s = sums + blockIdx.x * sums_stride;
  for (int j = static_cast<int>(threadIdx.x); j < visible; j += 256) s[j] = 0;
  for (int h = 0; h < group && count > 0; ++h) {
    Real most = -INFINITY;
    for (int m = static_cast<int>(threadIdx.x); m < count; m += 256) {
      most = max(most, logit(h, coarse ? coarse_key(m) : fine_key(m)));
    }
    most = reduce(most, true);
    Real sum = 0;
    for (int m = static_cast<int>(threadIdx.x); m < count; m += 256) {
      sum += exp(logit(h, coarse ? coarse_key(m) : fine_key(m)) - most);
    }
    sum = reduce(sum, false);
    for (int j = static_cast<int>(threadIdx.x); j < visible; j += 256) {
      s[j] += exp(logit(h, fine_key(j)) - most) / sum;
    }
  }
  __syncthreads();
  for (int b = static_cast<int>(threadIdx.x); b < blocks; b += 256) {
    Real best = -INFINITY;
    for (int j = max(0, 4 * b - 1); j < min(4 * b + 4, visible); ++j) best = max(best, s[j]);
    scores[blockIdx.x * blocks + b] = best;
  }
}

// One step of one layer on the device.
template <typename T>
class Run {
 public:
  explicit Run(const Case& c) : case_(c), state_(std::make_shared<Device>()) {
    state_->capability = 90;
    must(cudaDeviceGetAttribute(&state_->sm_count, cudaDevAttrMultiProcessorCount, 0), "SMs");
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
    must(cudaMemset(page_memory_.data(), 0xff, page_memory_.size()), "poison");
    pages_ = {page_memory_.data(), layout, page_bytes, static_cast<std::int32_t>(pages)};
    fill_pages<T><<<dim3(max_pages, count), 256>>>(PagePool(pages_), batch_, c.dim, c.content);

    const int width = c.heads_kv * c.group * c.dim;
    q_ = Array<T>(static_cast<std::size_t>(batch_.num_tokens) * width);
    const float spread = c.content == Content::kZero ? 0 : c.content == Content::kExtreme ? 200 : 2;
    fill_queries<T>
        <<<dim3((width + 127) / 128, (batch_.num_tokens + kQueryChunk - 1) / kQueryChunk), 128>>>(
            q_.data(), batch_.num_tokens, width, spread, c.correlation);
    must(cudaDeviceSynchronize(), "filling");
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
    must(cudaMemset(workspace_.data(), 0xff, workspace_.size()), "poison");
  }

  int columns() const { return params_.select.columns(); }
  std::size_t workspace_bytes() const { return sm90::score_select_bytes(backend_, params_); }
  bool covered() const { return sm90::score_selects(backend_, params_); }
  const Batch& batch() const { return batch_; }

  void launch() {
    must(sm90::score_select(backend_, params_, {workspace_.data(), workspace_.size()}));
  }
  std::vector<std::int32_t> select() {
    must(cudaMemset(selection_.data(), 0x55, selection_.size() * 4), "poison");
    launch();
    must(cudaDeviceSynchronize(), "score_select");
    return selection_.host();
  }

  double measure() {
    for (int i = 0; i < 2; ++i) launch();
    cudaEvent_t from, to;
    must(cudaEventCreate(&from), "event");
    must(cudaEventCreate(&to), "event");
    std::vector<float> times;
    float total = 0;
    while (times.size() < 5 || (times.size() < 15 && total < 300)) {
      cudaEventRecord(from);
      launch();
      cudaEventRecord(to);
      must(cudaEventSynchronize(to), "score_select");
      float ms = 0;
      cudaEventElapsedTime(&ms, from, to);
      times.push_back(ms);
      total += ms;
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
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

  // What is wrong, or nothing.
  std::string check() {
    const std::vector<std::int32_t> chosen = select();
    if (chosen != select()) return "two runs differ";
    std::string problem = check_alone(chosen);
    if (!problem.empty()) return problem;

    std::vector<std::int32_t> rows;  // sequence, head, position
    std::mt19937 random(7);
    const std::int64_t all = std::int64_t{case_.heads_kv} * batch_.num_tokens;
    for (int b = 0; b < batch_.num_sequences; ++b) {
      for (int i = 0; i < case_.tokens[b]; ++i) {
        for (int g = 0; g < case_.heads_kv; ++g) {
          const int p = case_.lengths[b] - case_.tokens[b] + i;
          const std::int32_t* row = row_of(chosen, b, g, p);
          if (!case_.sparse.empty() && case_.sparse[b] == 0) {
            for (int c = 0; c < columns(); ++c) {
              if (row[c] != 0x55555555) return text("dense sequence %d was written", b);
            }
            continue;
          }
          problem = check_form(row, p);
          if (!problem.empty()) return text("seq %d head %d pos %d: %s", b, g, p, problem.c_str());
          if (!case_.config.selects_all_at(p) && random() % all < unsigned(case_.samples)) {
            rows.insert(rows.end(), {b, g, p});
          }
        }
      }
    }
    return judge(chosen, rows);
  }

  std::int64_t judged() const { return judged_; }

 private:
  const std::int32_t* row_of(const std::vector<std::int32_t>& chosen, int b, int g, int p) const {
    const std::int64_t token = starts_[b] + p - (case_.lengths[b] - case_.tokens[b]);
    return chosen.data() + (std::int64_t{g} * batch_.num_tokens + token) * columns();
  }

  // Every sequence gives the same when it is the only one of its step.
  std::string check_alone(const std::vector<std::int32_t>& chosen) {
    if (batch_.num_sequences == 1) return {};
    const ScoreSelectParams together = params_;
    std::string problem;
    for (int b = 0; b < batch_.num_sequences && problem.empty(); ++b) {
      if (case_.tokens[b] == 0 || (!case_.sparse.empty() && case_.sparse[b] == 0)) continue;
      Array<std::int32_t> starts(std::vector<std::int32_t>{0, case_.tokens[b]});
      Batch one = batch_;
      one.num_sequences = 1;
      one.num_tokens = case_.tokens[b];
      one.query_start = starts.data();
      one.kv_length = batch_.kv_length + b;
      one.page_table = batch_.page_table + std::int64_t{b} * batch_.max_pages;
      one.sparse = batch_.sparse + b;
      one.max_query_length = case_.tokens[b];
      one.max_kv_length = case_.lengths[b];
      params_.score.batch = params_.select.batch = one;
      params_.score.q =
          q_.data() + std::int64_t{starts_[b]} * case_.heads_kv * case_.group * case_.dim;
      const std::vector<std::int32_t> alone = select();
      const int k = columns();
      params_ = together;
      for (int g = 0; g < case_.heads_kv; ++g) {
        for (int i = 0; i < case_.tokens[b] && problem.empty(); ++i) {
          const std::int32_t* row = row_of(chosen, b, g, case_.lengths[b] - case_.tokens[b] + i);
          const std::int32_t* own = alone.data() + (std::int64_t{g} * case_.tokens[b] + i) * k;
          for (int c = 0; c < columns(); ++c) {
            if (row[c] != (c < k ? own[c] : -1)) {
              problem = text("sequence %d differs alone: token %d column %d: %d %d", b, i, c,
                             row[c], c < k ? own[c] : -1);
            }
          }
        }
      }
    }
    return problem;
  }

  std::string check_form(const std::int32_t* row, int p) const {
    const SparseConfig& config = case_.config;
    const int own = p / config.block_size;
    const int expected = std::min({config.budget_blocks(), columns(), own + 1});
    for (int i = 0; i < columns(); ++i) {
      if (i >= expected && row[i] != -1) return text("column %d is %d, not -1", i, row[i]);
      if (i < expected && (row[i] < 0 || row[i] > own || (i > 0 && row[i] <= row[i - 1]))) {
        return text("column %d is %d", i, row[i]);
      }
    }
    const auto has = [&](int b) { return std::binary_search(row, row + expected, b); };
    int room = expected;
    for (int b = own; b >= config.first_local_block(p) && room > 0; --b, --room) {
      if (!has(b)) return text("local block %d is missing", b);
    }
    for (int b = 0; b < config.init_blocks && b < config.first_local_block(p) && room > 0;
         ++b, --room) {
      if (!has(b)) return text("sink block %d is missing", b);
    }
    if (case_.content == Content::kTies || case_.content == Content::kZero) {
      // All candidates tie, so the lowest ones are chosen.
      const auto local = static_cast<int>(config.first_local_block(p));
      for (int i = 0; i < expected && row[i] < local; ++i) {
        if (row[i] != i) return text("column %d is %d although blocks tie", i, row[i]);
      }
    }
    return {};
  }

  std::string judge(const std::vector<std::int32_t>& chosen,
                    const std::vector<std::int32_t>& rows) {
    const SparseConfig& config = case_.config;
    const auto count = static_cast<std::int64_t>(rows.size() / 3);
    judged_ = count;
    if (count == 0) return {};
    const std::int64_t blocks = params_.select.blocks();
    const std::vector<double> exact = reference<double>(rows, blocks);
    const std::vector<double> rounded = reference<float>(rows, blocks);
    const auto free = [&](std::int64_t row, std::int64_t b) {
      return b >= config.init_blocks && b < config.first_local_block(rows[3 * row + 2]);
    };
    double share = 0;
    for (std::int64_t r = 0; r < count; ++r) {
      for (std::int64_t b = 0; b < blocks; ++b) {
        const double e = exact[r * blocks + b];
        if (free(r, b) && e > 1e-30) {
          share = std::max(share, 2 * std::fabs(rounded[r * blocks + b] / e - 1));
        }
      }
    }
    const bool bf16 = config.score_rounding == ScoreRounding::kBF16;
    const auto budget = [&](double x) {
      const double ulp = std::ldexp(1.0, std::ilogb(std::max(x, 1e-37)) - (bf16 ? 7 : 23));
      return share * x + ulp;
    };
    for (std::int64_t r = 0; r < count; ++r) {
      const std::int32_t* row = row_of(chosen, rows[3 * r], rows[3 * r + 1], rows[3 * r + 2]);
      double lowest_in = INFINITY;
      double highest_out = -INFINITY;
      for (std::int64_t b = 0; b < blocks; ++b) {
        const double e = exact[r * blocks + b];
        if (!free(r, b) || !std::isfinite(e)) continue;
        if (std::find(row, row + columns(), b) != row + columns()) {
          lowest_in = std::min(lowest_in, e + budget(e));
        } else {
          highest_out = std::max(highest_out, e - budget(e));
        }
      }
      if (lowest_in < highest_out) {
        return text(
            "seq %d head %d pos %d: a block of at most %.7g was chosen, one of %.7g was not "
            "(share %.2g)",
            rows[3 * r], rows[3 * r + 1], rows[3 * r + 2], lowest_in, highest_out, share);
      }
    }
    return {};
  }

  template <typename Real>
  std::vector<double> reference(const std::vector<std::int32_t>& rows, std::int64_t blocks) {
    const auto count = static_cast<std::int64_t>(rows.size() / 3);
    const std::int64_t stride = blocks * kFineRows;
    Array<std::int32_t> places(rows);
    Array<Real> sums(static_cast<std::size_t>(count * stride));
    Array<double> scores(static_cast<std::size_t>(count * blocks));
    reference_rows<Real, T><<<static_cast<unsigned>(count), 256>>>(
        PagePool(pages_), batch_, case_.config, case_.group, case_.dim, scale_, q_.data(),
        places.data(), sums.data(), stride, scores.data(), blocks);
    must(cudaDeviceSynchronize(), "reference");
    return scores.host();
  }

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
  std::int64_t judged_ = 0;
};

SparseConfig small_config() {
  SparseConfig c;
  c.window_size = 128;
  c.topk = 4;
  c.dense_len = -1;
  return c;
}

std::vector<Case> cases() {
  const SparseConfig small = small_config();
  SparseConfig released;
  released.dense_len = -1;
  const auto with = [](SparseConfig c, auto&& change) {
    change(c);
    return c;
  };
  std::vector<Case> list;
  // Lengths and histories at every edge of windows, blocks and tiles, prefilled whole and in part.
  const std::vector<int> lengths = {1,   15,  31,  32,  63,  64,  65,  127, 128, 383, 384,
                                    385, 447, 448, 449, 511, 512, 513, 700, 777, 1024};
  std::vector<int> parts;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    parts.push_back(i % 5 == 3 ? 0 : std::min(lengths[i], 1 + static_cast<int>(i) * 17));
  }
  for (const int group : {16, 8, 4, 2}) {
    for (const int dim : {128, 64}) {
      const std::string shape = text("g%d_d%d", group, dim);
      list.push_back({.name = "edges_" + shape,
                      .config = small,
                      .group = group,
                      .dim = dim,
                      .lengths = lengths,
                      .tokens = lengths,
                      .samples = 4000});
      list.push_back({.name = "parts_" + shape,
                      .config = small,
                      .group = group,
                      .dim = dim,
                      .lengths = lengths,
                      .tokens = parts,
                      .samples = 4000});
      list.push_back({.name = "released_" + shape,
                      .config = released,
                      .group = group,
                      .dim = dim,
                      .lengths = {9001},
                      .tokens = {9001}});
    }
  }
  std::vector<int> some_sparse(lengths.size());
  for (std::size_t i = 0; i < lengths.size(); ++i) some_sparse[i] = i % 3 != 1;
  list.push_back({.name = "mixed",
                  .config = small,
                  .lengths = lengths,
                  .tokens = parts,
                  .sparse = some_sparse,
                  .samples = 4000});
  list.push_back({.name = "f16",
                  .config = small,
                  .dtype = DType::kF16,
                  .lengths = lengths,
                  .tokens = lengths,
                  .samples = 4000});
  list.push_back({.name = "released_f16",
                  .config = released,
                  .dtype = DType::kF16,
                  .lengths = {7777},
                  .tokens = {1777}});
  const auto variant = [&](const std::string& name, auto&& change) {
    list.push_back({.name = name,
                    .config = with(small, change),
                    .lengths = lengths,
                    .tokens = parts,
                    .samples = 4000});
    list.push_back({.name = name + "_long",
                    .config = with(released, change),
                    .lengths = {6500, 12345},
                    .tokens = {500, 2345}});
  };
  variant("fine", [](SparseConfig& c) { c.lse_source = LseSource::kFine; });
  variant("exact", [](SparseConfig& c) { c.score_rounding = ScoreRounding::kNone; });
  variant("legacy", [](SparseConfig& c) { c.legacy_window = true; });
  variant("no_sink", [](SparseConfig& c) { c.init_blocks = 0; });
  variant("two_sinks", [](SparseConfig& c) { c.init_blocks = 2; });
  variant("no_window", [](SparseConfig& c) { c.window_size = 0; });
  variant("no_window_fine", [](SparseConfig& c) {
    c.window_size = 0;
    c.lse_source = LseSource::kFine;
    c.score_rounding = ScoreRounding::kNone;
  });
  variant("topk_2", [](SparseConfig& c) { c.topk = 2; });
  variant("topk_128", [](SparseConfig& c) {
    c.topk = 128;
    c.window_size = 512;
  });
  for (const Content content : {Content::kZero, Content::kTies, Content::kExtreme}) {
    const char* names[] = {"", "zero", "ties", "extreme"};
    const std::string name = names[static_cast<int>(content)];
    list.push_back({.name = name,
                    .config = small,
                    .lengths = lengths,
                    .tokens = lengths,
                    .content = content,
                    .samples = 4000});
    list.push_back({.name = name + "_long",
                    .config = released,
                    .lengths = {20000},
                    .tokens = {1000},
                    .content = content});
    list.push_back({.name = name + "_g4",
                    .config = released,
                    .group = 4,
                    .lengths = {20000},
                    .tokens = {1000},
                    .content = content});
  }
  list.push_back({.name = "batch_long",
                  .config = released,
                  .lengths = {40000, 6144, 6145, 8193, 131},
                  .tokens = {300, 1000, 1000, 8193, 131}});
  list.push_back({.name = "one_head_chunk",
                  .config = released,
                  .heads_kv = 1,
                  .lengths = {65536 + 7},
                  .tokens = {129},
                  .correlation = 0.9f});
  list.push_back({.name = "eight_heads",
                  .config = released,
                  .heads_kv = 8,
                  .group = 4,
                  .dim = 64,
                  .lengths = {10000},
                  .tokens = {200}});
  list.push_back({.name = "million",
                  .config = released,
                  .lengths = {1048576},
                  .tokens = {100},
                  .samples = 20});
  return list;
}

template <typename T>
bool check_one(const Case& c) {
  Run<T> run(c);
  if (!run.covered()) {
    std::printf("%-20s not covered\n", c.name.c_str());
    return true;
  }
  const std::string problem = run.check();
  std::printf("%-20s %5d rows judged  %s\n", c.name.c_str(), static_cast<int>(run.judged()),
              problem.empty() ? "ok" : problem.c_str());
  std::fflush(stdout);
  return problem.empty();
}

int check(const std::string& only) {
  int failed = 0;
  int count = 0;
  for (const Case& c : cases()) {
    if (!only.empty() && c.name != only) continue;
    ++count;
    failed += !(c.dtype == DType::kBF16 ? check_one<__nv_bfloat16>(c) : check_one<__half>(c));
  }
  std::printf("%d of %d cases failed\n", failed, count);
  return failed != 0;
}

// Products that a token needs: its visible normalising windows, and those of its candidates.
double flops_of(const SparseConfig& config, int tokens, int heads, int dim) {
  double scores = 0;
  for (std::int64_t p = 0; p < tokens; ++p) {
    if (config.selects_all_at(p)) continue;
    scores += static_cast<double>(config.coarse_windows(p + 1) + 4 * config.first_local_block(p));
  }
  return 2.0 * dim * heads * scores;
}

void bench(int tokens, int group, int dim, float correlation) {
  SparseConfig config;
  config.dense_len = -1;
  Run<__nv_bfloat16> run({.name = "bench",
                          .config = config,
                          .group = group,
                          .dim = dim,
                          .lengths = {tokens},
                          .tokens = {tokens},
                          .correlation = correlation});
  const double ms = run.measure();
  const double flops = flops_of(config, tokens, 2 * group, dim);
  std::printf(
      "%8d tokens %2d/2 heads d %3d correlation %.2f overlap %.2f: %9.3f ms %5.0f TFLOP/s, %4.1f%% "
      "of "
      "790, workspace %.1f MB\n",
      tokens, 2 * group, dim, correlation, run.overlap(), ms, flops / ms * 1e-9,
      flops / ms * 1e-9 / 7.9, run.workspace_bytes() * 1e-6);
  std::fflush(stdout);
}

int run_main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "check";
  if (mode == "check") return check(argc > 2 ? argv[2] : "");
  std::vector<int> sizes;
  for (int i = 2; i < argc; ++i) sizes.push_back(std::stoi(argv[i]));
  if (sizes.empty()) sizes = {8192, 32768, 131072, 524288, 1048576};
  for (const int tokens : sizes) {
    for (const float correlation : {0.0f, 0.95f}) bench(tokens, 16, 128, correlation);
    if (tokens == 131072) bench(tokens, 8, 64, 0.95f);
  }
  return 0;
}

}  // namespace

#ifdef INFLLM_STANDALONE
Device::~Device() = default;
const Device& device_of(const Backend& backend) {
  return *static_cast<const Device*>(backend.state.get());
}
Status to_status(std::string_view step, cudaError_t error) {
  if (error == cudaSuccess) return {};
  return io_error(std::string(step) + ": " + cudaGetErrorString(error));
}
Status launched(std::string_view step) { return to_status(step, cudaGetLastError()); }
#endif

}  // namespace infllm::cuda

int main(int argc, char** argv) { return infllm::cuda::run_main(argc, argv); }
