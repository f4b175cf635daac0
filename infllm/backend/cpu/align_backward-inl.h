// SPDX-License-Identifier: Apache-2.0
//
// Gradients of the selection-alignment loss (ops/align.h), without atomics, in three passes that
// own what they write:
//
//   rows      a task is (row, KV head), walks the windows that have a gradient and the normalising
//             ones, and sums dQ; X, which the next pass needs of every row, is written too
//   windows   a task is (sequence, KV head, tile of 64 pooled keys), walks the sequence's rows in
//             their order and sums dKC
//   keys      a task is (sequence, KV head, block): each key takes its share of the windows
//             that hold it
#pragma once

#include <numeric>

#include "infllm/backend/cpu/align-inl.h"
#include "infllm/backend/cpu/turn-inl.h"

INFLLM_CPU_BEGIN

template <class Num>
struct AlignBackwardScratch {
  using Element = typename Num::Element;
  AlignScratch<Num> tile;
  float* norm;       // [G] base 2
  float* x;          // [G] X
  float* grad_q;     // [G, D]
  float* grad_key;   // [64, D]
  Element* turned;   // [64 / per, D] the tile laid out as values are
  Element* weights;  // [G, 64 / per], or turned [64, kGroupRows / per]
  Element* pairs;    // [kGroupRows / per, D]

  template <class Taker>
  void take(Taker&& taker, const AlignParams& p) {
    const std::int64_t group = p.heads_q / p.pages.layout.kv_heads;
    const std::int64_t dim = p.pages.layout.head_dim;
    tile.take(taker, p);
    taker(norm, group);
    taker(x, group);
    taker(grad_q, group * dim);
    taker(grad_key, kPageTokens * dim);
    taker(turned, kPageTokens * dim / Num::kPer);
    taker(weights, std::max<std::int64_t>(group, kGroupRows) * kPageTokens / Num::kPer);
    taker(pairs, kGroupRows * dim / Num::kPer);
  }
};

// Where the gradients of all sequences' pooled keys lie in the workspace: [B, Hkv, windows, D] fine
// ones, then coarse ones, rounded up to tiles.
struct AlignKeyRows {
  explicit AlignKeyRows(const AlignParams& p)
      : fine(round(p.config.fine_windows(p.batch.max_kv_length))),
        coarse(p.config.lse_source == LseSource::kFine
                   ? 0
                   : round(p.config.coarse_windows(p.batch.max_kv_length))),
        floats(std::int64_t{p.batch.num_sequences} * p.pages.layout.kv_heads * (fine + coarse) *
               p.pages.layout.head_dim) {}

  static std::int64_t round(std::int64_t rows) { return ceil_div(rows, kPageTokens) * kPageTokens; }

  std::int64_t fine;
  std::int64_t coarse;
  std::int64_t floats;
};

template <class Num>
class BackwardAligner {
 public:
  using Element = typename Num::Element;
  using Scratch = AlignBackwardScratch<Num>;

  // `x` [Hkv, R, G], `key_rows` as AlignKeyRows says.
  BackwardAligner(const AlignBackwardParams& params, float* x, float* key_rows)
      : p_(params), f_(params.forward), t_(f_), rows_(f_), x_(x), key_rows_(key_rows) {}

  void row_gradient(std::int64_t r, std::int64_t head, const Scratch& w) const {
    const std::int64_t width = t_.group * t_.dim;
    float* x = x_ + (head * f_.num_rows + r) * t_.group;
    std::fill_n(x, t_.group, 0.0f);
    std::fill_n(w.grad_q, width, 0.0f);
    float* out = static_cast<float*>(p_.grad_q) + (r * t_.heads_kv + head) * width;
    const AlignRow row(f_, r);
    if (row.is_empty()) {
      std::fill_n(out, width, 0.0f);
      return;
    }
    const Sequence sequence(f_.pages, f_.batch, row.index);
    load(row, r, head, w);
    const PooledKeys fine = fine_keys(f_.config, t_.map, head);
    for (std::int64_t first = row.window / kPageTokens * kPageTokens; first < row.end_window;
         first += kPageTokens) {
      HWY_ALIGN float grads[kPageTokens];
      if (!window_gradients(row, r, head, first, grads)) continue;
      t_.multiply_pooled(sequence, fine, first, tile_count(row.visible - first), w.tile);
      score_gradients(grads, w);
      for (int h = 0; h < t_.group; ++h) {
        x[h] = std::accumulate(w.tile.s + h * kPageTokens, w.tile.s + (h + 1) * kPageTokens, x[h]);
      }
      add_grad_q(w);
    }
    std::copy_n(x, t_.group, w.x);
    const PooledKeys keys = norm_keys(f_.config, t_.map, head);
    const std::int64_t end = keys.visible(row.position);
    for (std::int64_t first = 0; first < end; first += kPageTokens) {
      t_.multiply_pooled(sequence, keys, first, tile_count(end - first), w.tile);
      norm_gradients(tile_count(end - first), w);
      add_grad_q(w);
    }
    for (std::int64_t d = 0; d < width; ++d) out[d] = w.grad_q[d] * f_.scale;
  }

  // Tile `tile` of the fine pooled keys or, behind them, of the coarse ones.
  void tile_gradient(std::int32_t index, std::int64_t head, std::int64_t tile,
                     const Scratch& w) const {
    const Sequence sequence(f_.pages, f_.batch, index);
    const bool is_fine = tile * kPageTokens < rows_.fine;
    const std::int64_t first = tile * kPageTokens - (is_fine ? 0 : rows_.fine);
    const PooledKeys keys =
        is_fine ? fine_keys(f_.config, t_.map, head) : coarse_keys(f_.config, t_.map, head);
    const bool normalises = !is_fine || f_.config.lse_source == LseSource::kFine;
    if (first >= keys.visible(sequence.length - 1)) return;
    std::fill_n(w.grad_key, kPageTokens * t_.dim, 0.0f);
    for (std::int64_t r = 0; r < f_.num_rows; ++r) {
      const AlignRow row(f_, r);
      if (row.index != index || row.is_empty()) continue;
      const int count = tile_count(keys.visible(row.position) - first);
      HWY_ALIGN float grads[kPageTokens];
      const bool scores = is_fine && window_gradients(row, r, head, first, grads);
      if (count <= 0 || !(scores || normalises)) continue;
      load(row, r, head, w);
      if (scores) {
        t_.multiply_pooled(sequence, keys, first, count, w.tile);
        score_gradients(grads, w);
        add_grad_keys(w);
      }
      if (normalises) {
        std::copy_n(x_ + (head * f_.num_rows + r) * t_.group, t_.group, w.x);
        t_.multiply_pooled(sequence, keys, first, count, w.tile);
        norm_gradients(count, w);
        add_grad_keys(w);
      }
    }
    std::copy_n(w.grad_key, kPageTokens * t_.dim, key_row(index, head, tile * kPageTokens));
  }

  void key_gradient(std::int32_t index, std::int64_t head, std::int64_t block,
                    std::int64_t first_key) const {
    const Sequence sequence(f_.pages, f_.batch, index);
    const SparseConfig& c = f_.config;
    for (std::int64_t t = block * kPageTokens;
         t < std::min<std::int64_t>(sequence.length, (block + 1) * kPageTokens); ++t) {
      float* out = static_cast<float*>(p_.grad_k) + ((first_key + t) * t_.heads_kv + head) * t_.dim;
      std::fill_n(out, t_.dim, 0.0f);
      add_windows(key_row(index, head, 0), t, c.kernel_size, c.kernel_stride, sequence.length, out);
      if (rows_.coarse == 0) continue;
      add_windows(key_row(index, head, rows_.fine), t, c.coarse_size(), c.coarse_stride(),
                  sequence.length, out);
    }
  }

  std::int64_t tiles() const { return (rows_.fine + rows_.coarse) / kPageTokens; }

 private:
  static int tile_count(std::int64_t rest) {
    return static_cast<int>(std::min<std::int64_t>(kPageTokens, rest));
  }
  float* key_row(std::int64_t index, std::int64_t head, std::int64_t row) const {
    return key_rows_ + ((index * t_.heads_kv + head) * (rows_.fine + rows_.coarse) + row) * t_.dim;
  }

  void load(const AlignRow& row, std::int64_t r, std::int64_t head, const Scratch& w) const {
    t_.load(t_.score_queries(), row.token, head, w.tile);
    for (std::int64_t h = 0; h < t_.group; ++h) {
      const float norm =
          static_cast<const float*>(f_.norms)[(head * t_.group + h) * f_.num_rows + r];
      w.norm[h] = norm * static_cast<float>(kLog2E);
    }
  }

  // ds of windows first .. first + 63; false if it is all zeros.
  bool window_gradients(const AlignRow& row, std::int64_t r, std::int64_t head, std::int64_t first,
                        float* grads) const {
    const SparseConfig& c = f_.config;
    const std::int64_t at = head * f_.num_rows + r;
    const float grad_loss = static_cast<const float*>(p_.grad_loss)[at];
    const auto* scores = static_cast<const float*>(f_.grad_scores) + at * t_.blocks;
    const std::int32_t* windows = f_.windows + at * t_.blocks;
    std::fill_n(grads, kPageTokens, 0.0f);
    bool any = false;
    const std::int64_t last_token = (first + kPageTokens - 1) * c.kernel_stride + c.kernel_size - 1;
    const std::int64_t end = std::min(row.end_block, last_token / kPageTokens + 1);
    for (std::int64_t b = std::max(row.first_block, first * c.kernel_stride / kPageTokens); b < end;
         ++b) {
      const std::int64_t j = windows[b] - first;
      if (j < 0 || j >= kPageTokens) continue;
      grads[j] += grad_loss * scores[b];
      any |= grads[j] != 0;
    }
    return any;
  }

  // Logits to dx of the windows' scores.
  void score_gradients(const float* grads, const Scratch& w) const {
    const F32 d;
    t_.soften_group(w.norm, w.tile, nullptr);
    for (int j = 0; j < kPageTokens; j += kLanes) {
      const VF32 grad = hn::Load(d, grads + j);
      for (int h = 0; h < t_.group; ++h) {
        float* x = w.tile.s + h * kPageTokens + j;
        hn::StoreU(hn::Mul(hn::LoadU(d, x), grad), d, x);
      }
    }
  }

  // Logits of `count` normalising keys to the gradients -X n that they get.
  void norm_gradients(int count, const Scratch& w) const {
    const F32 d;
    for (int h = 0; h < t_.group; ++h) {
      float* x = w.tile.s + h * kPageTokens;
      mask_after(x, count);
      const VF32 norm = hn::Set(d, w.norm[h]);
      const VF32 factor = hn::Set(d, -w.x[h]);
      for (int j = 0; j < kPageTokens; j += kLanes) {
        const VF32 share = exp2(hn::MulSub(hn::LoadU(d, x + j), hn::Set(d, t_.c), norm));
        hn::StoreU(hn::Mul(share, factor), d, x + j);
      }
    }
  }

  // dQ += dx keys, of the tile.
  void add_grad_q(const Scratch& w) const {
    turn_keys<Num>(w.tile.pooled, t_.dim, w.turned);
    to_elements<Num>(w.tile.s, std::int64_t{t_.group} * kPageTokens, w.weights);
    Product<Num> product;
    for (int first = 0; first < t_.group; first += kGroupRows) {
      const int n = std::min(kGroupRows, t_.group - first);
      for (int i = 0; i < n; ++i) {
        product.a[i] = w.weights + (first + i) * (kPageTokens / Num::kPer);
        product.c[i] = w.grad_q + (first + i) * t_.dim;
      }
      product.template run<true>(n, w.turned, t_.dim, t_.dim, kPageTokens / Num::kPer);
    }
  }

  // dKC += dx^T q, of the tile.
  void add_grad_keys(const Scratch& w) const {
    for (int first = 0; first < t_.group; first += kGroupRows) {
      const int n = std::min(kGroupRows, t_.group - first);
      add_turned<Num>(w.tile.s + first * kPageTokens, w.tile.q + first * (t_.dim / Num::kPer), n,
                      t_.dim, w.weights, w.pairs, w.grad_key);
    }
  }

  // Adds what the token gets from the windows that hold it.
  void add_windows(const float* rows, std::int64_t t, std::int64_t size, std::int64_t stride,
                   std::int64_t length, float* out) const {
    const std::int64_t first = t < size ? 0 : (t - size) / stride + 1;
    const std::int64_t end = std::min(t / stride + 1, windows_in(length, size, stride));
    const float share = f_.scale / static_cast<float>(size);
    for (std::int64_t j = first; j < end; ++j) {
      for (std::int64_t d = 0; d < t_.dim; ++d) out[d] += rows[j * t_.dim + d] * share;
    }
  }

  const AlignBackwardParams& p_;
  const AlignParams& f_;
  AlignTiles<Num> t_;
  AlignKeyRows rows_;
  float* x_;
  float* key_rows_;
};

template <class Num>
Status align_backward_with(const Backend& backend, const AlignBackwardParams& params,
                           std::span<std::byte> workspace) {
  const AlignParams& f = params.forward;
  Arena arena(workspace);
  auto* first_key = arena.take<std::int64_t>(f.batch.num_sequences);
  auto* x = arena.take<float>(std::int64_t{f.num_rows} * f.heads_q);
  auto* key_rows = arena.take<float>(AlignKeyRows(f).floats);
  auto* scratch = arena.take<AlignBackwardScratch<Num>>(backend.pool->size());
  for (int worker = 0; worker < backend.pool->size(); ++worker) {
    scratch[worker].take(
        [&](auto*& pointer, std::int64_t count) {
          pointer = arena.take<std::remove_reference_t<decltype(*pointer)>>(count);
        },
        f);
  }
  std::int64_t keys = 0;
  for (std::int32_t i = 0; i < f.batch.num_sequences; ++i) {
    first_key[i] = keys;
    keys += f.batch.kv_length[i];
  }
  const BackwardAligner<Num> aligner(params, x, key_rows);
  const std::int64_t heads = f.pages.layout.kv_heads;
  const std::int64_t pairs = f.batch.num_sequences * heads;
  const std::int64_t blocks = ceil_div(f.batch.max_kv_length, kPageTokens);
  backend.pool->parallel_for(f.num_rows * heads, [&](std::int64_t task, int worker) {
    aligner.row_gradient(f.num_rows - 1 - task / heads, task % heads, scratch[worker]);
  });
  backend.pool->parallel_for(pairs * aligner.tiles(), [&](std::int64_t task, int worker) {
    const std::int64_t pair = task % pairs;
    aligner.tile_gradient(static_cast<std::int32_t>(pair / heads), pair % heads, task / pairs,
                          scratch[worker]);
  });
  backend.pool->parallel_for(pairs * blocks, [&](std::int64_t task, int) {
    const std::int64_t pair = task % pairs;
    aligner.key_gradient(static_cast<std::int32_t>(pair / heads), pair % heads, task / pairs,
                         first_key[pair / heads]);
  });
  return {};
}

Status run_align_backward(const Backend& backend, const AlignBackwardParams& params,
                          std::span<std::byte> workspace) {
  return with_element(params.forward.pages.layout.dtype, [&]<class Num>() -> Status {
    return align_backward_with<Num>(backend, params, workspace);
  });
}

// Sized for floats, which need the most.
std::size_t align_backward_bytes(const Backend& backend, const AlignBackwardParams& params) {
  const AlignParams& f = params.forward;
  ArenaSize size;
  size.take<std::int64_t>(f.batch.num_sequences);
  size.take<float>(std::int64_t{f.num_rows} * f.heads_q);
  size.take<float>(AlignKeyRows(f).floats);
  size.take<AlignBackwardScratch<Floats>>(backend.pool->size());
  for (int worker = 0; worker < backend.pool->size(); ++worker) {
    AlignBackwardScratch<Floats>{}.take(
        [&]<class T>(T*&, std::int64_t count) { size.take<T>(count); }, f);
  }
  return size.bytes();
}

INFLLM_CPU_END
