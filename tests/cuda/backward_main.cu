// SPDX-License-Identifier: Apache-2.0
//
// Test and bench of the CUDA columns' attend_backward by itself, for a GPU machine that has nothing
// but CUDA.
//
//   backward_main check [NAME]    shapes against float64 on sampled rows and keys; every result is
//                                 taken twice and must repeat bit by bit; exit status 1 on a
//                                 failure
//   backward_main bench N...      milliseconds and useful TFLOP/s, sparse and dense
#include <cstring>

#include "infllm/backend/cuda/backward/attend_backward.h"
#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/sm80/attend.h"
#include "tests/cuda/prefill_check.h"

namespace infllm::cuda {
namespace {

template <typename T>
std::vector<T> normals(std::size_t count, std::uint64_t seed) {
  constexpr std::size_t kPiece = 1 << 20;
  std::vector<T> values(count);
  parallel(int((count + kPiece - 1) / kPiece), [&](int piece) {
    Random random{seed + 0x9e3779b97f4a7c15ull * std::uint64_t(piece)};
    const std::size_t end = std::min(count, (piece + 1) * kPiece);
    for (std::size_t i = piece * kPiece; i < end; ++i) values[i] = T(random.normal());
  });
  return values;
}

// A rig, what the forward pass made of it, and where gradients go.
template <typename T>
struct Bed {
  Bed(const Case& c, const std::vector<int>& lists, int list_columns)
      : rig(c),
        selection(lists),
        columns(list_columns),
        given(lists),
        o(rig.queries.size()),
        lse(std::size_t(rig.heads_q()) * rig.batch.num_tokens),
        grad_o_host(normals<T>(rig.queries.size(), 0x51ed270b)),
        grad_lse_host(normals<float>(lse.count, 0x2545f491)),
        grad_o(grad_o_host),
        grad_lse(grad_lse_host) {
    for (const Span& s : c.spans) keys += s.end;
  }

  AttendBackwardParams params(T* grad_q, T* grad_k, T* grad_v) const {
    AttendParams forward = rig.attend_params(o.data, lse.data, columns > 0 ? given.data : nullptr);
    forward.columns = columns;
    return {.forward = forward,
            .grad_o = grad_o.data,
            .grad_lse = grad_lse.data,
            .grad_q = grad_q,
            .grad_k = grad_k,
            .grad_v = grad_v};
  }
  std::size_t key_count() const { return keys * rig.c.heads_kv * rig.c.dim; }

  Rig<T> rig;
  std::vector<int> selection;  // [Hkv, T, columns]; empty: dense
  int columns;
  Array<int> given;
  Array<T> o;
  Array<float> lse;
  std::vector<T> grad_o_host;
  std::vector<float> grad_lse_host;
  Array<T> grad_o;
  Array<float> grad_lse;
  std::size_t keys = 0;
};

template <typename Run>
void with_workspace(std::size_t bytes, Run&& run) {
  const Array<std::byte> workspace(bytes);
  must(run(std::span<std::byte>(workspace.data, bytes)));
  must(cudaDeviceSynchronize());
}

template <typename T>
struct Gradients {
  std::vector<T> q, k, v;
};

template <typename T>
Gradients<T> differentiate(const Backend& backend, const Bed<T>& bed) {
  const Array<T> q(bed.rig.queries.size()), k(bed.key_count()), v(bed.key_count());
  const AttendBackwardParams p = bed.params(q.data, k.data, v.data);
  with_workspace(backward::attend_backward_bytes(backend, p),
                 [&](auto w) { return backward::attend_backward(backend, p, w); });
  return {q.host(), k.host(), v.host()};
}

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// One (row, key) pair in double, and what a kernel may be off by.
template <typename T>
class Judge {
 public:
  Judge(const Bed<T>& bed)
      : bed_(bed), rig_(bed.rig), o_(bed.o.host()), lse_(bed.lse.host()), dim_(rig_.c.dim) {}

  bool sees(const Place& at, int g, int block) const {
    if (block > at.position / 64) return false;
    if (bed_.columns == 0 || !rig_.c.spans[at.sequence].sparse) return true;
    const int* row =
        bed_.selection.data() + (std::int64_t{g} * rig_.batch.num_tokens + at.token) * bed_.columns;
    return std::find(row, row + bed_.columns, block) != row + bed_.columns;
  }

  struct Pair {
    double p, grad_x;              // the weight and dS
    double p_error, grad_x_error;  // before they are rounded to T, and the rounding
  };
  Pair pair(const Place& at, int h, const T* k, const T* v) const {
    const std::int64_t row = std::int64_t{at.token} * rig_.heads_q() + h;
    const std::int64_t stat = std::int64_t{h} * rig_.batch.num_tokens + at.token;
    const T* q = rig_.queries.data() + row * dim_;
    const T* grad_o = bed_.grad_o_host.data() + row * dim_;
    const T* o = o_.data() + row * dim_;
    const double lse = lse_[stat];
    const double x = rig_.scale() * dot(q, k, dim_);
    const double p = std::exp(x - lse);
    const double grad_p = dot(grad_o, v, dim_);
    const double delta = dot(grad_o, o, dim_) - bed_.grad_lse_host[stat];
    const double additions = (dim_ + 4) * 0x1p-24;
    // Of x - LSE: the product's additions, log2(e) within both numbers; then the exponential.
    const double share = additions * rig_.scale() * norm(q, dim_) * norm(k, dim_) +
                         (std::fabs(x) + std::fabs(lse)) * 0x1p-22 + 0x1p-20;
    const double sums = additions * norm(grad_o, dim_) * (norm(v, dim_) + norm(o, dim_)) +
                        std::fabs(bed_.grad_lse_host[stat]) * 0x1p-23;
    const double grad_x = p * (grad_p - delta);
    return {p, grad_x, p * (share + kUnit<T>)+kTiny,
            std::fabs(grad_x) * (share + kUnit<T>)+p * (1 + share) * sums + kTiny};
  }

  // Of a sum of pairs' dS (or P) times the numbers of a row, and the rounding of the result.
  void compare(Report& report, T got, double sum, double size, double error, std::size_t count,
               double factor) const {
    const double chain = double(count) * 0x1p-24;
    report.compare(
        float(got), sum * factor,
        factor * (error + 2 * chain * size) + std::fabs(sum * factor) * 2 * kUnit<T> + kTiny);
  }

  const T* query(const Place& at, int h) const {
    return rig_.queries.data() + (std::int64_t{at.token} * rig_.heads_q() + h) * dim_;
  }
  const T* grad_o(const Place& at, int h) const {
    return bed_.grad_o_host.data() + (std::int64_t{at.token} * rig_.heads_q() + h) * dim_;
  }

 private:
  // Half the smallest number of T, for results that flush.
  static constexpr double kTiny = std::is_same_v<T, __half> ? 0x1p-24 : 1e-30;

  const Bed<T>& bed_;
  const Rig<T>& rig_;
  std::vector<T> o_;
  std::vector<float> lse_;
  int dim_;
};

Report sum_of(const std::vector<Report>& reports) {
  Report total;
  for (const Report& r : reports) {
    total.worst = std::max(total.worst, r.worst);
    total.wrong += r.wrong;
  }
  return total;
}

template <typename T>
Report check_queries(const Bed<T>& bed, const Judge<T>& judge, const std::vector<T>& grad_q) {
  const Rig<T>& rig = bed.rig;
  const int dim = rig.c.dim;
  const std::vector<Place> places = sample(rig, 24);
  std::vector<Report> reports(places.size() * rig.heads_q());
  parallel(int(reports.size()), [&](int task) {
    const Place at = places[task / rig.heads_q()];
    const int h = task % rig.heads_q();
    const int g = h / rig.c.group;
    std::vector<double> sum(dim), size(dim), error(dim);
    std::size_t count = 0;
    for (int b = 0; b <= at.position / 64; ++b) {
      if (!judge.sees(at, g, b)) continue;
      for (int t = b * 64; t < std::min(b * 64 + 64, at.position + 1); ++t) {
        const T* k = rig.row(at.sequence, b, rig.map.key(g), t % 64);
        if (k == nullptr) break;
        const auto pair = judge.pair(at, h, k, rig.row(at.sequence, b, rig.map.value(g), t % 64));
        ++count;
        for (int d = 0; d < dim; ++d) {
          const double x = float(k[d]);
          sum[d] += pair.grad_x * x;
          size[d] += std::fabs(pair.grad_x * x);
          error[d] += pair.grad_x_error * std::fabs(x);
        }
      }
    }
    const T* got = grad_q.data() + (std::int64_t{at.token} * rig.heads_q() + h) * dim;
    for (int d = 0; d < dim; ++d) {
      judge.compare(reports[task], got[d], sum[d], size[d], error[d], count, rig.scale());
    }
  });
  return sum_of(reports);
}

// Some keys of every sequence: the first ones, the last ones and random ones.
template <typename T>
Report check_keys(const Bed<T>& bed, const Judge<T>& judge, const Gradients<T>& gradients) {
  const Rig<T>& rig = bed.rig;
  const int dim = rig.c.dim;
  struct Key {
    int sequence, position;
    std::int64_t packed;
    int first_token;
  };
  std::vector<Key> keys;
  Random random{99};
  std::int64_t before = 0;
  int token = 0;
  for (int s = 0; s < int(rig.c.spans.size()); ++s) {
    const Span& span = rig.c.spans[s];
    const int samples = rig.c.spans.size() > 10 ? 3 : 10;
    for (int i = 0; i < samples && span.end > 0; ++i) {
      const int t = i == 0   ? 0
                    : i == 1 ? span.end - 1
                    : i == 2 ? std::max(0, span.first - 1)
                             : random.below(span.end);
      keys.push_back({s, t, before + t, token});
    }
    before += span.end;
    token += span.end - span.first;
  }
  std::vector<Report> reports(keys.size() * rig.c.heads_kv);
  parallel(int(reports.size()), [&](int task) {
    const Key key = keys[task / rig.c.heads_kv];
    const int g = task % rig.c.heads_kv;
    const int block = key.position / 64;
    const T* k = rig.row(key.sequence, block, rig.map.key(g), key.position % 64);
    const Span& span = rig.c.spans[key.sequence];
    std::vector<double> sum(2 * dim), size(2 * dim), error(2 * dim);
    std::size_t count = 0;
    for (int p = std::max(span.first, key.position); k != nullptr && p < span.end; ++p) {
      const Place at{key.sequence, p, key.first_token + p - span.first};
      if (!judge.sees(at, g, block)) continue;
      const T* v = rig.row(key.sequence, block, rig.map.value(g), key.position % 64);
      for (int h = g * rig.c.group; h < (g + 1) * rig.c.group; ++h, ++count) {
        const auto pair = judge.pair(at, h, k, v);
        const T* q = judge.query(at, h);
        const T* grad_o = judge.grad_o(at, h);
        for (int d = 0; d < dim; ++d) {
          const double x = float(q[d]);
          sum[d] += pair.grad_x * x;
          size[d] += std::fabs(pair.grad_x * x);
          error[d] += pair.grad_x_error * std::fabs(x);
          const double y = float(grad_o[d]);
          sum[dim + d] += pair.p * y;
          size[dim + d] += std::fabs(pair.p * y);
          error[dim + d] += pair.p_error * std::fabs(y);
        }
      }
    }
    const std::int64_t at = (key.packed * rig.c.heads_kv + g) * dim;
    for (int d = 0; d < dim; ++d) {
      judge.compare(reports[task], gradients.k[at + d], sum[d], size[d], error[d], count,
                    rig.scale());
      judge.compare(reports[task], gradients.v[at + d], sum[dim + d], size[dim + d], error[dim + d],
                    count, 1);
    }
  });
  return sum_of(reports);
}

// Ascending blocks, the first one nearly always, holes, rows without any, numbers that are none.
template <typename T>
std::vector<int> any_selection(const Rig<T>& rig, int columns) {
  const std::int64_t blocks = (rig.batch.max_kv_length + 63) / 64;
  const std::size_t rows = std::size_t(rig.c.heads_kv) * rig.batch.num_tokens;
  std::vector<int> selection(rows * columns, -1);
  Random random{5};
  for (std::size_t r = 0; r < rows; ++r) {
    if (random.below(7) == 0) continue;
    int at = 0;
    const int stride = 1 + random.below(int(std::max<std::int64_t>(1, 2 * blocks / columns)));
    for (int b = 0; b < blocks && at < columns; b += 1 + random.below(stride)) {
      selection[r * columns + at++] = b;
    }
    if (at < columns) selection[r * columns + at] = 1 << 29;
  }
  return selection;
}

template <typename T>
bool check_case(const Backend& backend, const Case& c) {
  constexpr int kColumns = 6;
  bool right = true;
  for (const bool sparse : {true, false}) {
    const std::vector<int> lists = sparse ? any_selection(Rig<T>(c), kColumns) : std::vector<int>();
    const Bed<T> bed(c, lists, sparse ? kColumns : 0);
    const AttendParams forward = bed.params(nullptr, nullptr, nullptr).forward;
    with_workspace(sm80::attend_bytes(backend, forward),
                   [&](auto w) { return sm80::attend(backend, forward, w); });
    const Gradients<T> once = differentiate(backend, bed);
    const Gradients<T> again = differentiate(backend, bed);
    const bool repeats = same(once.q, again.q) && same(once.k, again.k) && same(once.v, again.v);
    const Judge<T> judge(bed);
    const Report q = check_queries(bed, judge, once.q);
    const Report k = check_keys(bed, judge, once);
    const bool ok = repeats && q.wrong == 0 && k.wrong == 0;
    std::printf("%-4s %-28s %-6s dQ %.3f (%d)  dK, dV %.3f (%d)%s\n", ok ? "ok" : "BAD",
                c.name.c_str(), sparse ? "sparse" : "dense", q.worst, q.wrong, k.worst, k.wrong,
                repeats ? "" : "  DOES NOT REPEAT");
    right &= ok;
  }
  return right;
}

std::vector<Case> cases() {
  const std::vector<Span> ragged = {{517, 541}, {0, 70},           {460, 461},  {0, 0},
                                    {701, 720}, {300, 333, false}, {900, 1000}, {128, 128}};
  std::vector<Case> list;
  const auto add = [&](std::string name, auto change) {
    Case c{.name = std::move(name),
           .config = SparseConfig{.dense_len = -1},
           .heads_kv = 2,
           .group = 4,
           .dim = 64,
           .spans = ragged};
    change(c);
    list.push_back(std::move(c));
  };
  for (const int group : {1, 2, 7, 16, 32, 40}) {
    for (const int dim : {64, 128}) {
      for (const DType dtype : {DType::kBF16, DType::kF16}) {
        add("g" + std::to_string(group) + " d" + std::to_string(dim) + " " +
                std::string(name_of(dtype)),
            [&](Case& c) {
              c.group = group;
              c.dim = dim;
              c.dtype = dtype;
            });
      }
    }
  }
  add("edges", [](Case& c) {
    c.spans.clear();
    for (const int n : {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129}) {
      c.spans.push_back({0, n});
      c.spans.push_back({std::max(0, n - 1), n});
    }
  });
  add("zero queries", [](Case& c) { c.query_scale = 0; });
  add("large logits", [](Case& c) { c.query_scale = 60; });
  add("missing pages", [](Case& c) { c.missing_pages = true, c.group = 16, c.dim = 128; });
  add("cut lists", [](Case& c) {
    c.group = 8;
    c.dim = 128;
    c.spans = {{0, 5000}, {100, 2400, false}, {0, 2300}};
  });
  return list;
}

// Median of five, in milliseconds.
double time_of(cudaStream_t stream, const std::function<void()>& run) {
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin));
  must(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 6; ++i) {
    must(cudaEventRecord(begin, stream));
    run();
    must(cudaEventRecord(end, stream));
    must(cudaEventSynchronize(end));
    float ms = 0;
    must(cudaEventElapsedTime(&ms, begin, end));
    if (i > 0) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// The first block, 33 local ones, and others of which a token keeps each with probability `keep`.
std::vector<int> correlated_selection(int tokens, int heads, int columns, double keep) {
  constexpr int kLocal = 33;
  std::vector<int> selection(std::size_t(heads) * tokens * columns, -1);
  parallel(heads, [&](int g) {
    Random random{0x9e3779b97f4a7c15ull + std::uint64_t(g)};
    std::vector<int> free;
    std::vector<char> taken(tokens / 64 + 1);
    for (int t = 0; t < tokens; ++t) {
      int* row = selection.data() + (std::size_t(g) * tokens + t) * columns;
      const int own = t / 64;
      const int candidates = own - kLocal;  // blocks 1 .. candidates
      const int count = std::min(columns - kLocal - 1, std::max(0, candidates));
      std::erase_if(free, [&](int b) {
        const bool drop = count < candidates && random.below(1000) >= int(keep * 1000);
        if (drop) taken[b] = 0;
        return drop;
      });
      while (int(free.size()) < count) {
        const int b = 1 + random.below(candidates);
        if (taken[b]) continue;
        taken[b] = 1;
        free.push_back(b);
      }
      std::sort(free.begin(), free.end());
      int at = 0;
      row[at++] = 0;
      for (const int b : free) row[at++] = b;
      for (int b = std::max(1, own - kLocal + 1); b <= own; ++b) row[at++] = b;
    }
  });
  return selection;
}

void bench(const Backend& backend, int tokens, bool sparse) {
  using T = __nv_bfloat16;
  constexpr int kColumns = 96;
  const Case c{.name = "bench",
               .config = SparseConfig{},
               .heads_kv = 2,
               .group = 16,
               .dim = 128,
               .spans = {{0, tokens}}};
  const std::vector<int> lists =
      sparse ? correlated_selection(tokens, 2, kColumns, 0.955) : std::vector<int>();
  const Bed<T> bed(c, lists, sparse ? kColumns : 0);
  const cudaStream_t stream = device_of(backend).stream;
  const Array<T> q(bed.rig.queries.size()), k(bed.key_count()), v(bed.key_count());
  const AttendBackwardParams p = bed.params(q.data, k.data, v.data);
  const std::size_t bytes = backward::attend_backward_bytes(backend, p);
  const Array<std::byte> workspace(std::max(bytes, sm80::attend_bytes(backend, p.forward)));
  const std::span<std::byte> w(workspace.data, workspace.count);
  const double forward = time_of(stream, [&] { must(sm80::attend(backend, p.forward, w)); });
  const double back = time_of(stream, [&] { must(backward::attend_backward(backend, p, w)); });
  double pairs = 0;
  for (int t = 0; t < tokens; ++t) {
    pairs += sparse && t / 64 + 1 > kColumns ? (kColumns - 1) * 64 + t % 64 + 1 : t + 1;
  }
  const double flops = 4.0 * pairs * 32 * 128;
  std::printf(
      "%7d %-6s forward %8.3f ms (%3.0f TF)  backward %8.3f ms (%3.0f TF)  workspace %.0f MB\n",
      tokens, sparse ? "sparse" : "dense", forward, flops / forward * 1e-9, back,
      2.5 * flops / back * 1e-9, double(bytes) * 1e-6);
  std::fflush(stdout);
}

int run(int argc, char** argv) {
  Backend backend{.name = "cuda:0:sm80"};
  auto device = open_device(0);
  must(device.status());
  backend.state = device.value();
  const std::string mode = argc > 1 ? argv[1] : "check";
  if (mode == "bench") {
    for (int i = 2; i < argc; ++i) {
      bench(backend, std::atoi(argv[i]), true);
      if (std::atoi(argv[i]) <= 32768) bench(backend, std::atoi(argv[i]), false);
    }
    return 0;
  }
  int bad = 0;
  for (const Case& c : cases()) {
    if (argc > 2 && c.name != argv[2]) continue;
    bad += !(c.dtype == DType::kF16 ? check_case<__half>(backend, c)
                                    : check_case<__nv_bfloat16>(backend, c));
  }
  std::printf("%d cases failed\n", bad);
  return bad == 0 ? 0 : 1;
}

}  // namespace
}  // namespace infllm::cuda

int main(int argc, char** argv) { return infllm::cuda::run(argc, argv); }
