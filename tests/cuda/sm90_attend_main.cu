// SPDX-License-Identifier: Apache-2.0
//
// Test and bench of Hopper's attend by itself, for a GPU machine that has nothing but CUDA.
//
//   sm90_attend_main check [NAME]    every shape, or those whose name has NAME in it, against
//   float64
//                                    on the host; exit status 1 on a failure
//   sm90_attend_main time [CONFIG] [gG_dD] N...  dense and sparse at these lengths; one JSON object
//   a line
//
// Numbers come from a hash of their place, so that the host can compute any row of a case that only
// the device holds. Pages are shuffled and memory that nobody wrote is NaN.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "infllm/backend/cuda/sm90/attend_launch.cuh"

namespace infllm::cuda::sm90 {
namespace {

#define MUST(call)                                                               \
  do {                                                                           \
    const cudaError_t error = (call);                                            \
    if (error != cudaSuccess) {                                                  \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(error)); \
      std::exit(2);                                                              \
    }                                                                            \
  } while (false)

void must(const Status& status) {
  if (status.ok()) return;
  std::printf("%s\n", status.message().c_str());
  std::exit(2);
}

template <typename T>
class Array {
 public:
  explicit Array(std::int64_t count, int fill = 0xff) : count_(count) {
    MUST(
        cudaMalloc(&data_, static_cast<std::size_t>(std::max<std::int64_t>(count, 1)) * sizeof(T)));
    MUST(cudaMemset(data_, fill, static_cast<std::size_t>(count) * sizeof(T)));
  }
  explicit Array(const std::vector<T>& host) : Array(static_cast<std::int64_t>(host.size())) {
    MUST(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(data_); }
  T* get() const { return data_; }
  std::vector<T> read(std::int64_t first, std::int64_t count) const {
    std::vector<T> host(static_cast<std::size_t>(count));
    MUST(cudaMemcpy(host.data(), data_ + first, host.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
  std::vector<T> read() const { return read(0, count_); }

 private:
  T* data_ = nullptr;
  std::int64_t count_;
};

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
    memory = std::make_unique<Array<std::byte>>(params.pages.page_bytes * pages);
    params.pages.data = memory->get();
    d_starts = std::make_unique<Array<std::int32_t>>(starts);
    d_lengths = std::make_unique<Array<std::int32_t>>(lengths);
    d_table = std::make_unique<Array<std::int32_t>>(table);
    d_sparse = std::make_unique<Array<std::uint8_t>>(sparse);
    params.batch.num_sequences = static_cast<std::int32_t>(c.sequences.size());
    params.batch.num_tokens = tokens;
    params.batch.query_start = d_starts->get();
    params.batch.kv_length = d_lengths->get();
    params.batch.page_table = d_table->get();
    params.batch.max_pages = row;
    params.batch.sparse = d_sparse->get();
    params.batch.max_kv_length = longest;
    const PagePool pool(params.pages);
    for (std::size_t b = 0; b < c.sequences.size(); ++b) {
      const auto blocks = static_cast<unsigned>((lengths[b] + 63) / 64);
      if (blocks == 0) continue;
      fill_pages<T><<<dim3(blocks, static_cast<unsigned>(c.heads_kv)), 256>>>(
          pool, d_table->get() + b * static_cast<std::size_t>(row), static_cast<int>(b), lengths[b],
          c.dim);
    }
    const std::int64_t elements = std::int64_t{tokens} * heads() * c.dim;
    q = std::make_unique<Array<T>>(elements);
    o = std::make_unique<Array<T>>(elements);
    lse = std::make_unique<Array<float>>(std::int64_t{tokens} * heads());
    fill_rows<T><<<1024, 256>>>(q->get(), kQuery, elements, query_scale);
    MUST(cudaGetLastError());
    params.heads_q = heads();
    params.scale = 1 / std::sqrt(static_cast<float>(c.dim));
    params.q = q->get();
    params.o = o->get();
    params.lse = lse->get();
    scale_of_q = query_scale;
    if (c.columns > 0) choose(random);
    MUST(cudaDeviceSynchronize());
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
    params.selection = d_selection->get();
    params.columns = test.columns;
  }

  // The released budget on one sequence.
  void draw(float rho) {
    const std::size_t shared = static_cast<std::size_t>((tokens + 63) / 64 + 4) * sizeof(float);
    MUST(cudaFuncSetAttribute(draw_selection, cudaFuncAttributeMaxDynamicSharedMemorySize, 131072));
    d_selection =
        std::make_unique<Array<std::int32_t>>(std::int64_t{test.heads_kv} * tokens * kBudget);
    draw_selection<<<dim3(static_cast<unsigned>((tokens + 255) / 256),
                          static_cast<unsigned>(test.heads_kv)),
                     256, shared>>>(d_selection->get(), tokens, rho);
    MUST(cudaDeviceSynchronize());
    params.selection = d_selection->get();
    params.columns = kBudget;
  }

  // Exact and rounded rows of token `t` (packed), all heads of KV head h; and what the kernel made.
  struct Errors {
    double rounding = 0, lse_rounding = 0;  // of the honest kernel, the worst
    std::vector<std::array<double, 3>> o;   // got, exact
    std::vector<std::array<double, 3>> lse;
  };
  void examine(int b, int i, int h, const std::int32_t* chosen, const T* got, const float* got_lse,
               Errors& errors) const {
    const int dim = test.dim;
    const int position = test.sequences[static_cast<std::size_t>(b)].history + i;
    const int t = starts[static_cast<std::size_t>(b)] + i;
    std::vector<int> positions;
    const auto see = [&](int block) {
      const int page = block < params.batch.max_pages
                           ? table[static_cast<std::size_t>(b * params.batch.max_pages + block)]
                           : -1;
      if (page < 0 || page >= params.pages.num_pages) return;
      for (int p = block * 64; p < std::min(block * 64 + 64, position + 1); ++p)
        positions.push_back(p);
    };
    if (chosen == nullptr || !test.sequences[static_cast<std::size_t>(b)].sparse) {
      for (int block = 0; block <= position / 64; ++block) see(block);
    } else {
      for (int k = 0; k < params.columns && chosen[k] >= 0; ++k) {
        if (chosen[k] <= position / 64) see(chosen[k]);
      }
    }
    std::vector<double> keys(positions.size() * static_cast<std::size_t>(dim)), values(keys.size());
    for (std::size_t p = 0; p < positions.size(); ++p) {
      for (int d = 0; d < dim; ++d) {
        const auto at =
            static_cast<std::uint64_t>(place(b, test.heads_kv, h, positions[p], dim, d));
        keys[p * static_cast<std::size_t>(dim) + static_cast<std::size_t>(d)] =
            as_double(stored<T>(number(kKey, at)));
        values[p * static_cast<std::size_t>(dim) + static_cast<std::size_t>(d)] =
            as_double(stored<T>(number(kValue, at)));
      }
    }
    std::vector<double> x(positions.size());
    std::vector<float> xf(positions.size());
    for (int g = 0; g < test.group; ++g) {
      const int head = h * test.group + g;
      std::vector<double> query(static_cast<std::size_t>(dim));
      for (int d = 0; d < dim; ++d) {
        query[static_cast<std::size_t>(d)] = as_double(stored<T>(
            scale_of_q * number(kQuery, static_cast<std::uint64_t>(
                                            (std::int64_t{t} * heads() + head) * dim + d))));
      }
      double top = -INFINITY;
      float top_f = -INFINITY;
      for (std::size_t p = 0; p < positions.size(); ++p) {
        double sum = 0;
        float sum_f = 0;
        for (int d = 0; d < dim; ++d) {
          const double product =
              query[static_cast<std::size_t>(d)] *
              keys[p * static_cast<std::size_t>(dim) + static_cast<std::size_t>(d)];
          sum += product;
          sum_f += static_cast<float>(product);
        }
        x[p] = params.scale * sum;
        xf[p] = params.scale * sum_f;
        top = std::max(top, x[p]);
        top_f = std::max(top_f, xf[p]);
      }
      double total = 0;
      float total_f = 0;
      std::vector<double> exact(static_cast<std::size_t>(dim)),
          honest(static_cast<std::size_t>(dim));
      for (std::size_t p = 0; p < positions.size(); ++p) {
        const double w = std::exp(x[p] - top);
        const float wf = std::exp(xf[p] - top_f);
        total += w;
        total_f += wf;
        const double wr = rounded<T>(static_cast<double>(wf));
        for (int d = 0; d < dim; ++d) {
          const double v = values[p * static_cast<std::size_t>(dim) + static_cast<std::size_t>(d)];
          exact[static_cast<std::size_t>(d)] += w * v;
          honest[static_cast<std::size_t>(d)] += wr * v;
        }
      }
      for (int d = 0; d < dim; ++d) {
        const double e = positions.empty() ? 0 : exact[static_cast<std::size_t>(d)] / total;
        const double r =
            positions.empty()
                ? 0
                : rounded<T>(honest[static_cast<std::size_t>(d)] / static_cast<double>(total_f));
        errors.rounding = std::max(errors.rounding, std::abs(e - r));
        errors.o.push_back({as_double(got[g * dim + d]), e, r});
      }
      const double e = positions.empty() ? -INFINITY : top + std::log(total);
      const double r =
          positions.empty() ? -INFINITY : static_cast<double>(top_f + std::log(total_f));
      if (!positions.empty()) errors.lse_rounding = std::max(errors.lse_rounding, std::abs(e - r));
      errors.lse.push_back({static_cast<double>(got_lse[g]), e, r});
    }
  }

  // Every stride-th token, or all of them. Prints one line; true if within the budget of
  // tests/support/budget.h.
  bool check(const char* what, int stride = 1) const {
    std::vector<std::array<int, 3>> work;
    for (std::size_t b = 0; b < test.sequences.size(); ++b) {
      for (int i = 0; i < test.sequences[b].tokens; ++i) {
        if ((starts[b] + i) % stride != 0 && i + 1 != test.sequences[b].tokens) continue;
        for (int h = 0; h < test.heads_kv; ++h) work.push_back({static_cast<int>(b), i, h});
      }
    }
    const unsigned threads = std::max(1u, std::thread::hardware_concurrency());
    std::vector<Errors> parts(threads);
    std::vector<std::vector<T>> got_o(work.size());
    std::vector<std::vector<float>> got_lse(work.size());
    std::vector<std::vector<std::int32_t>> chosen(work.size());
    const bool whole = stride == 1;
    const std::vector<T> all_o = whole ? o->read() : std::vector<T>();
    const std::vector<float> all_lse = lse->read();
    const std::vector<std::int32_t> all_chosen =
        whole && params.selection != nullptr ? d_selection->read() : std::vector<std::int32_t>();
    for (std::size_t w = 0; w < work.size(); ++w) {
      const auto [b, i, h] = work[w];
      const std::int64_t t = starts[static_cast<std::size_t>(b)] + i;
      const std::int64_t at = (t * heads() + h * test.group) * test.dim;
      const std::int64_t n = static_cast<std::int64_t>(test.group) * test.dim;
      if (whole) {
        got_o[w].assign(all_o.begin() + at, all_o.begin() + at + n);
      } else {
        got_o[w] = o->read(at, n);
      }
      for (int g = 0; g < test.group; ++g) {
        got_lse[w].push_back(all_lse[static_cast<std::size_t>(
            (static_cast<std::int64_t>(h) * test.group + g) * tokens + t)]);
      }
      if (params.selection != nullptr) {
        const std::int64_t row = (static_cast<std::int64_t>(h) * tokens + t) * params.columns;
        if (whole) {
          chosen[w].assign(all_chosen.begin() + row, all_chosen.begin() + row + params.columns);
        } else {
          chosen[w] = d_selection->read(row, params.columns);
        }
      }
    }
    std::vector<std::thread> pool;
    for (unsigned n = 0; n < threads; ++n) {
      pool.emplace_back([&, n] {
        for (std::size_t w = n; w < work.size(); w += threads) {
          examine(work[w][0], work[w][1], work[w][2],
                  chosen[w].empty() ? nullptr : chosen[w].data(), got_o[w].data(),
                  got_lse[w].data(), parts[n]);
        }
      });
    }
    for (std::thread& thread : pool) thread.join();
    double rounding = 0, lse_rounding = 0;
    for (const Errors& e : parts) {
      rounding = std::max(rounding, e.rounding);
      lse_rounding = std::max(lse_rounding, e.lse_rounding);
    }
    constexpr int kBits = std::is_same_v<T, __half> ? 10 : 7;
    const auto ulp = [](double x, int bits) {
      return std::ldexp(1.0, std::max(std::ilogb(std::max(std::abs(x), 1e-30)), -14) - bits);
    };
    double worst = 0, worst_lse = 0, squares = 0, honest_squares = 0, ulp_squares = 0;
    std::int64_t bad = 0, elements = 0;
    const auto judge = [&](const std::array<double, 3>& v, double budget, double& share) {
      if (v[1] == v[0]) return;
      const double part = std::abs(v[0] - v[1]) / budget;
      if (!(part <= 1)) ++bad;
      share = std::isnan(part) ? INFINITY : std::max(share, part);
    };
    for (const Errors& e : parts) {
      for (const auto& v : e.o) {
        judge(v, 2 * rounding + ulp(v[1], kBits), worst);
        squares += (v[0] - v[1]) * (v[0] - v[1]);
        honest_squares += (v[2] - v[1]) * (v[2] - v[1]);
        ulp_squares += ulp(v[1], kBits) * ulp(v[1], kBits);
        ++elements;
      }
      for (const auto& v : e.lse) judge(v, 2 * lse_rounding + ulp(v[1], 23), worst_lse);
    }
    const double count = static_cast<double>(elements);
    const double rms = std::sqrt(squares / count) /
                       (2 * std::sqrt(honest_squares / count) + std::sqrt(ulp_squares / count));
    const bool ok = bad == 0 && rms <= 1;
    std::printf("%s %s %s: %lld numbers, share of budget: worst %.2f, rms %.2f, lse %.2f\n",
                ok ? "ok  " : "FAIL", test.name.c_str(), what, static_cast<long long>(elements),
                worst, rms, worst_lse);
    return ok;
  }

  void poison() {
    MUST(cudaMemset(
        o->get(), 0xff,
        static_cast<std::size_t>(std::int64_t{tokens} * heads() * test.dim) * sizeof(T)));
    MUST(cudaMemset(
        lse->get(), 0xff,
        static_cast<std::size_t>(tokens) * static_cast<std::size_t>(heads()) * sizeof(float)));
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

// One way to run the operation.
struct Runner {
  const char* name;
  bool sparse;
  Status (*run)(const AttendParams&, std::span<std::byte>, cudaStream_t, int sm_count);
  std::size_t (*bytes)(const AttendParams&);
  bool (*fits)(const AttendParams&);
};

template <class C>
Runner runner(const char* name) {
  return {name, C::kSparse, run_attend<C>, attend_bytes_of<C>, [](const AttendParams& p) {
            return p.pages.layout.head_dim == C::kDim &&
                   (C::kGroup == 0 || p.heads_q == C::kGroup * p.pages.layout.kv_heads) &&
                   std::is_same_v<typename C::Type, __half> ==
                       (p.pages.layout.dtype == DType::kF16) &&
                   (!C::kSparse || C::kRows / (p.heads_q / p.pages.layout.kv_heads) <=
                                       static_cast<int>(8 * sizeof(typename C::TokenSet)));
          }};
}

template <typename T>
void add_runners(std::vector<Runner>& all) {
  all.push_back(runner<DenseConfig<T, 128>>("dense"));
  all.push_back(runner<DenseConfig<T, 64>>("dense"));
  all.push_back(runner<TokenConfig<T, 128>>("sparse"));
  all.push_back(runner<TokenConfig<T, 64>>("sparse"));
  all.push_back(runner<RowConfig<T, 128>>("sparse_rows"));
  all.push_back(runner<RowConfig<T, 64>>("sparse_rows"));
}

const std::vector<Runner>& runners() {
  static const std::vector<Runner> all = [] {
    std::vector<Runner> made;
    add_runners<__nv_bfloat16>(made);
    add_runners<__half>(made);
    return made;
  }();
  return all;
}

int sm_count() {
  int count = 0;
  MUST(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
  return count;
}

template <typename T>
void run_once(Bed<T>& bed, const Runner& r) {
  Array<std::byte> workspace(static_cast<std::int64_t>(r.bytes(bed.params)));
  bed.poison();
  must(r.run(bed.params, {workspace.get(), r.bytes(bed.params)}, nullptr, sm_count()));
  MUST(cudaDeviceSynchronize());
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const std::vector<SequenceCase> ragged = {{0, 1, false},  {0, 64, false},  {0, 65, false},
                                            {0, 0, false},  {37, 3, false},  {130, 200, false},
                                            {63, 1, false}, {64, 64, false}, {1000, 77, false}};
  const std::vector<SequenceCase> ragged_sparse = {{0, 1, true},    {0, 130, true},   {0, 0, true},
                                                   {37, 3, true},   {700, 200, true}, {63, 1, true},
                                                   {2111, 65, true}};
  for (const int dim : {128, 64}) {
    for (const int group : {16, 8, 4, 2}) {
      const std::string tag = "g" + std::to_string(group) + "_d" + std::to_string(dim);
      const int heads = group == 16 ? 2 : 3;
      all.push_back({"dense_" + tag, heads, group, dim, 0, ragged});
      if (group == 2) continue;
      all.push_back({"sparse_" + tag, heads, group, dim, 8, ragged_sparse});
      all.push_back({"hostile_" + tag, heads, group, dim, 8, ragged_sparse, true});
    }
  }
  all.push_back({"hostile_dense", 2, 16, 128, 0, ragged, true});
  all.push_back({"dense_g1", 2, 1, 128, 0, {{0, 200, false}, {70, 90, false}}});
  all.push_back({"dense_g32", 1, 32, 128, 0, {{0, 200, false}, {70, 90, false}}});
  all.push_back({"sparse_g32", 1, 32, 128, 8, {{0, 200, true}, {870, 90, true}}});
  all.push_back({"dense_2500", 2, 16, 128, 0, {{0, 2500, false}}});
  all.push_back({"sparse_2500", 2, 16, 128, 20, {{0, 2500, true}}});
  all.push_back({"sparse_long", 1, 16, 128, 12, {{140001, 40, true}}});
  return all;
}

template <typename T>
bool check_all(const char* type, const std::string& only) {
  bool ok = true;
  for (const Case& c : cases()) {
    if (c.name.find(only) == std::string::npos) continue;
    Bed<T> bed(c, c.name == "dense_2500" ? 4.0f : 1.0f);
    for (const Runner& r : runners()) {
      if (r.sparse != bed.params.batch.any_sparse || !r.fits(bed.params)) continue;
      run_once(bed, r);
      const auto o = bed.o->read();
      const auto lse = bed.lse->read();
      ok = bed.check((std::string(type) + " " + r.name).c_str(), bed.tokens > 2000 ? 7 : 1) && ok;
      run_once(bed, r);
      const auto again = bed.o->read();
      if (std::memcmp(o.data(), again.data(), o.size() * sizeof(T)) != 0) {
        std::printf("FAIL %s %s: two runs differ\n", c.name.c_str(), r.name);
        ok = false;
      }
      // Each sequence alone: the same bits.
      for (std::size_t b = 0; b < c.sequences.size() && c.sequences.size() > 1; ++b) {
        const int tokens = c.sequences[b].tokens;
        if (tokens == 0) continue;
        const std::int64_t row = bed.heads() * std::int64_t{c.dim};
        AttendParams alone = bed.params;
        const Array<std::int32_t> starts(std::vector<std::int32_t>{0, tokens});
        alone.batch.num_sequences = 1;
        alone.batch.num_tokens = tokens;
        alone.batch.query_start = starts.get();
        alone.batch.kv_length += b;
        alone.batch.sparse += b;
        alone.batch.page_table += static_cast<std::int64_t>(b) * alone.batch.max_pages;
        alone.q = static_cast<const T*>(alone.q) + bed.starts[b] * row;
        const Array<T> out(tokens * row);
        const Array<float> out_lse(std::int64_t{tokens} * bed.heads());
        alone.o = out.get();
        alone.lse = out_lse.get();
        std::unique_ptr<Array<std::int32_t>> chosen;
        if (alone.selection != nullptr) {
          std::vector<std::int32_t> rows;
          for (int h = 0; h < c.heads_kv; ++h) {
            const auto first =
                bed.selection.begin() +
                (static_cast<std::int64_t>(h) * bed.tokens + bed.starts[b]) * c.columns;
            rows.insert(rows.end(), first, first + tokens * c.columns);
          }
          chosen = std::make_unique<Array<std::int32_t>>(rows);
          alone.selection = chosen->get();
        }
        Array<std::byte> workspace(static_cast<std::int64_t>(r.bytes(alone)));
        must(r.run(alone, {workspace.get(), r.bytes(alone)}, nullptr, sm_count()));
        MUST(cudaDeviceSynchronize());
        if (std::memcmp(out.read().data(), o.data() + bed.starts[b] * row,
                        static_cast<std::size_t>(tokens * row) * sizeof(T)) != 0) {
          std::printf("FAIL %s %s: sequence %zu alone differs\n", c.name.c_str(), r.name, b);
          ok = false;
        }
      }
    }
  }
  return ok;
}

double median_ms(const AttendParams& params, const Runner& r, Array<std::byte>& workspace,
                 std::size_t bytes, int repeats, double& low) {
  std::vector<float> times;
  cudaEvent_t begin, end;
  MUST(cudaEventCreate(&begin));
  MUST(cudaEventCreate(&end));
  for (int i = -2; i < repeats; ++i) {
    MUST(cudaEventRecord(begin));
    must(r.run(params, {workspace.get(), bytes}, nullptr, sm_count()));
    MUST(cudaEventRecord(end));
    MUST(cudaEventSynchronize(end));
    float ms = 0;
    MUST(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 0) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  low = times.front();
  return times[times.size() / 2];
}

void overlap(const Bed<__nv_bfloat16>& bed, int at) {
  std::printf("# union over one list at %d:", at);
  for (const int tile : {2, 4, 8, 12, 16}) {
    double all = 0;
    int tiles = 0;
    for (int first = at; first + tile <= std::min(at + 192, bed.tokens); first += tile, ++tiles) {
      std::vector<std::int32_t> ids =
          bed.d_selection->read(std::int64_t{first} * kBudget, std::int64_t{tile} * kBudget);
      std::sort(ids.begin(), ids.end());
      all += static_cast<double>(std::unique(ids.begin(), ids.end()) - ids.begin());
    }
    std::printf("  %d: %.2f", tile, all / tiles / kBudget);
  }
  std::printf("\n");
}

void time_all(const std::vector<int>& lengths, const char* only, int group, int dim) {
  for (const int n : lengths) {
    for (const char* input : {"dense", "correlated-0.8", "random"}) {
      const bool sparse = std::strcmp(input, "dense") != 0;
      if (sparse && n <= kBudget * kPageTokens) continue;
      Case c{"time", 2, group, dim, 0, {{0, n, sparse}}};
      const auto wanted = [&](const Runner& r) {
        return r.sparse == sparse && (only == nullptr || std::strcmp(r.name, only) == 0);
      };
      if (std::none_of(runners().begin(), runners().end(), wanted)) continue;
      Bed<__nv_bfloat16> bed(c);
      if (sparse) {
        bed.draw(std::strcmp(input, "random") == 0 ? -1.0f : 0.955f);
        overlap(bed, n - 256);
      }
      double keys = 0;
      for (int p = 0; p < n; ++p) {
        keys += sparse && p / 64 + 1 > kBudget ? (kBudget - 1) * 64 + p % 64 + 1 : p + 1;
      }
      const double flops = 4.0 * keys * bed.heads() * dim;
      for (const Runner& r : runners()) {
        if (!wanted(r) || !r.fits(bed.params)) continue;
        const std::size_t bytes = r.bytes(bed.params);
        Array<std::byte> workspace(static_cast<std::int64_t>(bytes));
        bed.poison();
        double low = 0;
        const double ms =
            median_ms(bed.params, r, workspace, bytes, n > 100000 && !sparse ? 3 : 7, low);
        std::printf(
            "{\"name\":\"attend.forward\",\"config\":\"%s\",\"input\":\"%s\",\"tokens\":%d,"
            "\"group\":%d,\"dim\":%d,\"ms\":%"
            ".3f,"
            "\"ms_low\":%.3f,\"tflops\":%.0f,\"workspace_mb\":%.0f}\n",
            r.name, input, n, group, dim, ms, low, flops / ms * 1e-9,
            static_cast<double>(bytes) * 1e-6);
        std::fflush(stdout);
        if (n >= 8192) bed.check(r.name, n / 3 - 1);
      }
    }
  }
}

}  // namespace
}  // namespace infllm::cuda::sm90

int main(int argc, char** argv) {
  using namespace infllm::cuda::sm90;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string verb = argc > 1 ? argv[1] : "";
  if (verb == "check") {
    const std::string name = argc > 2 ? argv[2] : "";
    const bool ok = check_all<__nv_bfloat16>("bf16", name) & check_all<__half>("f16", name);
    std::printf("%s\n", ok ? "all checks passed" : "CHECKS FAILED");
    return ok ? 0 : 1;
  }
  if (verb == "time") {
    const char* only = nullptr;
    int group = 16, dim = 128;
    std::vector<int> lengths;
    for (int i = 2; i < argc; ++i) {
      if (std::sscanf(argv[i], "g%d_d%d", &group, &dim) == 2) continue;
      if (std::atoi(argv[i]) > 0) {
        lengths.push_back(std::atoi(argv[i]));
      } else {
        only = argv[i];
      }
    }
    time_all(lengths, only, group, dim);
    return 0;
  }
  std::printf("usage: %s check [NAME] | time [CONFIG] [gG_dD] N...\n", argv[0]);
  return 2;
}
