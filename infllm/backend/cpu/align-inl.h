// SPDX-License-Identifier: Apache-2.0
//
// The selection-alignment loss (ops/align.h), one task a (row, KV head): the group's queries are
// the rows of products with tiles of 64 keys. Two passes over the keys, for the normaliser of dense
// attention and for the mass of the choosable blocks; then the pooled keys, as score does.
//
// Everything is in base 2 until the loss is written. AlignTiles is what the way back recomputes
// too.
#pragma once

#include "infllm/backend/cpu/pooled-inl.h"
#include "infllm/backend/cpu/softmax-inl.h"
#include "infllm/ops/kernels.h"

INFLLM_CPU_BEGIN

// A row's place and its choosable blocks.
struct AlignRow {
  AlignRow(const AlignParams& p, std::int64_t r) : token(p.rows == nullptr ? r : p.rows[r]) {
    if (token < 0 || token >= p.batch.num_tokens) return;
    const std::int32_t* starts = p.batch.query_start;
    index = static_cast<std::int32_t>(
        std::upper_bound(starts, starts + p.batch.num_sequences + 1, token) - starts - 1);
    position = p.batch.kv_length[index] - (starts[index + 1] - token);
    const SparseConfig& c = p.config;
    visible = c.fine_windows(position + 1);
    first_block = c.init_blocks;
    end_block = std::max(first_block, c.first_local_block(position));
    while (end_block > first_block && first_window(c, end_block - 1) >= visible) --end_block;
    if (end_block == first_block) return;
    window = first_window(c, first_block);
    end_window = std::min(c.first_window_of(end_block - 1) + c.windows_per_block(), visible);
  }

  static std::int64_t first_window(const SparseConfig& c, std::int64_t block) {
    return std::max<std::int64_t>(0, c.first_window_of(block));
  }
  bool is_empty() const { return first_block == end_block; }

  std::int64_t token;
  std::int32_t index = -1;  // of the sequence; -1: no row
  std::int64_t position = -1;
  std::int64_t visible = 0;      // fine windows
  std::int64_t first_block = 0;  // F is first_block .. end_block - 1
  std::int64_t end_block = 0;
  std::int64_t window = 0;  // those of F's blocks are window .. end_window - 1
  std::int64_t end_window = 0;
};

// A worker's tile, for a group of rows.
template <class Num>
struct AlignScratch {
  using Element = typename Num::Element;
  Element* q;              // [G, D / per]
  Element* pooled;         // [D / per, 64]
  float* s;                // [G + 1, 64]: turn_weights() fills up to an even number of rows
  RunningSoftmax softmax;  // [G]
  std::int32_t* row;       // [G] 0, 1, 2, ..

  template <class Taker>
  void take(Taker&& taker, const AlignParams& p) {
    const std::int64_t group = p.heads_q / p.pages.layout.kv_heads;
    const std::int64_t dim = p.pages.layout.head_dim;
    taker(q, group * dim / Num::kPer);
    taker(pooled, dim / Num::kPer * kPageTokens);
    taker(s, (group + 1) * kPageTokens);
    taker(softmax.m, group);
    taker(softmax.l, group * kLanes);
    taker(row, group);
  }
};

template <class Num>
class AlignTiles {
 public:
  using Element = typename Num::Element;

  explicit AlignTiles(const AlignParams& params)
      : p(params),
        map(params.pages.layout),
        heads_kv(params.pages.layout.kv_heads),
        group(params.heads_q / params.pages.layout.kv_heads),
        dim(params.pages.layout.head_dim),
        blocks(params.config.blocks_in(params.batch.max_kv_length)),
        c(static_cast<float>(params.scale * kLog2E)) {}

  const void* score_queries() const { return p.config.use_nope ? p.q_score : p.q; }

  void load(const void* q, std::int64_t token, std::int64_t head,
            const AlignScratch<Num>& w) const {
    const std::int64_t width = group * dim;
    to_elements<Num>(static_cast<const float*>(q) + (token * heads_kv + head) * width, width, w.q);
  }

  // s = q keys^T, [G, 64]. Floats take the sum in pieces, as the gradient of attention does: an
  // error of a logit is one of its weight's share.
  void multiply(const Element* keys, const AlignScratch<Num>& w) const {
    constexpr std::int64_t kPieces = Num::kPer == 1 ? 4 : 1;
    const std::int64_t steps = dim / Num::kPer / kPieces;
    HWY_ALIGN float piece_sums[Num::kPer == 1 ? kGroupRows * kPageTokens : 1];
    Product<Num> product{};
    for (int first = 0; first < group; first += kGroupRows) {
      const int n = std::min(kGroupRows, group - first);
      for (std::int64_t piece = 0; piece < kPieces; ++piece) {
        float* to = w.s + first * kPageTokens;
        float* sums = piece == 0 ? to : piece_sums;
        for (int i = 0; i < n; ++i) {
          product.a[i] = w.q + (first + i) * (dim / Num::kPer) + piece * steps;
          product.c[i] = sums + i * kPageTokens;
        }
        product.template run<false>(n, keys + piece * steps * kPageTokens, kPageTokens, kPageTokens,
                                    steps);
        for (int i = 0; piece > 0 && i < n * kPageTokens; ++i) to[i] += sums[i];
      }
    }
  }

  // The logits of `count` pooled keys from `first` on; the tile's other lanes become zeros.
  void multiply_pooled(const Sequence& sequence, const PooledKeys& keys, std::int64_t first,
                       int count, const AlignScratch<Num>& w) const {
    gather_pooled<Num>(sequence, keys, dim, first, count, w.pooled);
    for (std::int64_t k = 0; count < kPageTokens && k < dim / Num::kPer; ++k) {
      std::fill(w.pooled + k * kPageTokens + count, w.pooled + (k + 1) * kPageTokens, Element{});
    }
    multiply(w.pooled, w);
  }

  // The groups' x - log sum exp x, x = c s - norm, turned into weights in place; the log sum exp
  // goes to `sums` [64] if that is not null.
  void soften_group(const float* norm, const AlignScratch<Num>& w, float* sums) const {
    const F32 d;
    const VF32 vc = hn::Set(d, c);
    for (int j = 0; j < kPageTokens; j += kLanes) {
      VF32 top = hn::Set(d, kNoMaximum);
      for (int h = 0; h < group; ++h) {
        float* x = w.s + h * kPageTokens + j;
        const VF32 value = hn::MulSub(hn::LoadU(d, x), vc, hn::Set(d, norm[h]));
        hn::StoreU(value, d, x);
        top = hn::Max(top, value);
      }
      VF32 sum = hn::Zero(d);
      for (int h = 0; h < group; ++h) {
        float* x = w.s + h * kPageTokens + j;
        const VF32 weight = exp2(hn::Sub(hn::LoadU(d, x), top));
        hn::StoreU(weight, d, x);
        sum = hn::Add(sum, weight);
      }
      for (int h = 0; h < group; ++h) {
        float* x = w.s + h * kPageTokens + j;
        hn::StoreU(hn::Div(hn::LoadU(d, x), sum), d, x);
      }
      if (sums == nullptr) continue;
      hn::StoreU(sum, d, sums + j);
      for (int i = 0; i < kLanes; ++i) sums[j + i] = std::log2(sums[j + i]);
      hn::StoreU(hn::Add(hn::LoadU(d, sums + j), top), d, sums + j);
    }
  }

  const AlignParams& p;
  PageMap map;
  std::int64_t heads_kv;
  int group;
  std::int64_t dim;
  std::int64_t blocks;
  float c;
};

template <class Num>
class Aligner {
 public:
  explicit Aligner(const AlignParams& params) : p_(params), t_(params) {}

  // `scores` [windows of the longest sequence, rounded up to tiles] takes s.
  void run(std::int64_t r, std::int64_t head, const AlignScratch<Num>& w, float* scores) const {
    const std::int64_t at = head * p_.num_rows + r;
    float* grads = static_cast<float*>(p_.grad_scores) + at * t_.blocks;
    std::int32_t* windows = p_.windows + at * t_.blocks;
    auto& loss = static_cast<float*>(p_.loss)[at];
    std::fill_n(grads, t_.blocks, 0.0f);
    std::fill_n(windows, t_.blocks, -1);
    loss = 0;
    for (int h = 0; h < t_.group; ++h) norm(head, h, r) = 0;
    const AlignRow row(p_, r);
    if (row.is_empty()) return;

    const Sequence sequence(p_.pages, p_.batch, row.index);
    for (int h = 0; h < t_.group; ++h) w.row[h] = h;
    t_.load(p_.q, row.token, head, w);
    take_target(sequence, row, head, w, grads);
    if (p_.config.use_nope) t_.load(p_.q_score, row.token, head, w);
    normalise(sequence, row, head, w);
    for (int h = 0; h < t_.group; ++h) {
      norm(head, h, r) = w.softmax.m[h] * static_cast<float>(kLn2);
    }
    const PooledKeys fine = fine_keys(p_.config, t_.map, head);
    for (std::int64_t j = row.window; j < row.end_window; j += kPageTokens) {
      t_.multiply_pooled(sequence, fine, j, count(row.end_window - j), w);
      t_.soften_group(w.softmax.m, w, scores + (j - row.window));
    }
    loss = compare(row, scores - row.window, grads, windows);
  }

 private:
  static int count(std::int64_t rest) {
    return static_cast<int>(std::min<std::int64_t>(kPageTokens, rest));
  }
  float& norm(std::int64_t head, std::int64_t h, std::int64_t r) const {
    return static_cast<float*>(p_.norms)[(head * t_.group + h) * p_.num_rows + r];
  }

  void multiply_keys(const Sequence& sequence, std::int64_t block, std::int64_t head,
                     const AlignScratch<Num>& w) const {
    t_.multiply(sequence.plane<const typename Num::Element>(block, t_.map.key(head)), w);
  }

  // A of the choosable blocks.
  void take_target(const Sequence& sequence, const AlignRow& row, std::int64_t head,
                   const AlignScratch<Num>& w, float* mass) const {
    w.softmax.reset(t_.group);
    const std::int64_t own = row.position / kPageTokens;
    for (std::int64_t block = 0; block <= own; ++block) {
      multiply_keys(sequence, block, head, w);
      for (int h = 0; block == own && h < t_.group; ++h) {
        mask_after(w.s + h * kPageTokens, static_cast<int>(row.position % kPageTokens) + 1);
      }
      update_softmax<Num>(w.softmax, t_.group, w.row, w.s, t_.c, nullptr, nullptr, 0);
    }
    // Maxima and sums apart: a logarithm of the sum would round all weights of a row alike.
    const F32 d;
    for (std::int64_t block = row.first_block; block < row.end_block; ++block) {
      multiply_keys(sequence, block, head, w);
      VF32 sum = hn::Zero(d);
      for (int h = 0; h < t_.group; ++h) {
        const VF32 top = hn::Set(d, w.softmax.m[h]);
        VF32 row_sum = hn::Zero(d);
        for (int j = 0; j < kPageTokens; j += kLanes) {
          const VF32 x = hn::LoadU(d, w.s + h * kPageTokens + j);
          row_sum = hn::Add(row_sum, exp2(hn::MulSub(x, hn::Set(d, t_.c), top)));
        }
        sum = hn::MulAdd(row_sum, hn::Set(d, 1 / w.softmax.sum(h)), sum);
      }
      mass[block] = hn::GetLane(hn::SumOfLanes(d, sum)) / static_cast<float>(t_.group);
    }
  }

  // N, to softmax.m.
  void normalise(const Sequence& sequence, const AlignRow& row, std::int64_t head,
                 const AlignScratch<Num>& w) const {
    const PooledKeys keys = norm_keys(p_.config, t_.map, head);
    const std::int64_t end = keys.visible(row.position);
    w.softmax.reset(t_.group);
    for (std::int64_t m = 0; m < end; m += kPageTokens) {
      t_.multiply_pooled(sequence, keys, m, count(end - m), w);
      for (int h = 0; h < t_.group; ++h) mask_after(w.s + h * kPageTokens, count(end - m));
      update_softmax<Num>(w.softmax, t_.group, w.row, w.s, t_.c, nullptr, nullptr, 0);
    }
    if (end == 0) {
      std::fill_n(w.softmax.m, t_.group, 0.0f);
    } else {
      finish_softmax(w);
    }
  }

  void finish_softmax(const AlignScratch<Num>& w) const {
    for (int h = 0; h < t_.group; ++h) w.softmax.m[h] += std::log2(w.softmax.sum(h));
  }

  // From A and s to the loss and dR.
  float compare(const AlignRow& row, const float* scores, float* grads,
                std::int32_t* windows) const {
    const SparseConfig& config = p_.config;
    float top = -std::numeric_limits<float>::infinity();
    for (std::int64_t b = row.first_block; b < row.end_block; ++b) {
      const std::int64_t first = AlignRow::first_window(config, b);
      const std::int64_t end =
          std::min(config.first_window_of(b) + config.windows_per_block(), row.visible);
      windows[b] =
          static_cast<std::int32_t>(std::max_element(scores + first, scores + end) - scores);
      top = std::max(top, scores[windows[b]]);
    }
    double sum = 0;
    double mass = 0;
    for (std::int64_t b = row.first_block; b < row.end_block; ++b) {
      sum += std::exp2(scores[windows[b]] - top);
      mass += grads[b];
    }
    const double norm = std::log2(sum);
    double loss = 0;
    for (std::int64_t b = row.first_block; b < row.end_block; ++b) {
      const double log_r = scores[windows[b]] - top - norm;
      loss -= grads[b] * log_r * kLn2;
      grads[b] = static_cast<float>(std::exp2(log_r) * mass - grads[b]);
    }
    return static_cast<float>(loss);
  }

  const AlignParams& p_;
  AlignTiles<Num> t_;
};

// Room for s, a whole number of tiles whatever window a row begins with.
inline std::int64_t align_windows(const AlignParams& params) {
  return params.config.fine_windows(params.batch.max_kv_length) + kPageTokens;
}

template <class Num>
Status align_with(const Backend& backend, const AlignParams& params,
                  std::span<std::byte> workspace) {
  Arena arena(workspace);
  const std::int64_t windows = align_windows(params);
  auto* scores = arena.take<float>(windows * backend.pool->size());
  auto* scratch = arena.take<AlignScratch<Num>>(backend.pool->size());
  for (int worker = 0; worker < backend.pool->size(); ++worker) {
    scratch[worker].take(
        [&](auto*& pointer, std::int64_t count) {
          pointer = arena.take<std::remove_reference_t<decltype(*pointer)>>(count);
        },
        params);
  }
  const Aligner<Num> aligner(params);
  const std::int64_t heads = params.pages.layout.kv_heads;
  // Late rows see most keys.
  backend.pool->parallel_for(params.num_rows * heads, [&](std::int64_t task, int worker) {
    aligner.run(params.num_rows - 1 - task / heads, task % heads, scratch[worker],
                scores + windows * worker);
  });
  return {};
}

Status run_align(const Backend& backend, const AlignParams& params,
                 std::span<std::byte> workspace) {
  return with_element(params.pages.layout.dtype, [&]<class Num>() -> Status {
    return align_with<Num>(backend, params, workspace);
  });
}

// Sized for floats, which need the most.
std::size_t align_bytes(const Backend& backend, const AlignParams& params) {
  ArenaSize size;
  size.take<float>(align_windows(params) * backend.pool->size());
  size.take<AlignScratch<Floats>>(backend.pool->size());
  for (int worker = 0; worker < backend.pool->size(); ++worker) {
    AlignScratch<Floats>{}.take([&]<class T>(T*&, std::int64_t count) { size.take<T>(count); },
                                params);
  }
  return size.bytes();
}

INFLLM_CPU_END
