// SPDX-License-Identifier: Apache-2.0
//
// One score per (KV head, token, block), in two passes over pooled keys: the first finds each row's
// log-sum-exp, the second adds the group's probabilities and takes each block's best window. Both
// are products of a tile of rows with tiles of 64 pooled keys, gathered from the pages once a tile.
//
// Only windows of blocks that selection may choose freely are scored in the second pass (those
// before the local window, spec section 5); the first needs every visible one.
//
// A sequence with one token splits both passes over its windows, kScoreSegment at a time; group
// sums then go through memory to a last pass that takes the maxima.
#pragma once

#include "infllm/backend/cpu/page.h"
#include "infllm/backend/cpu/pooled-inl.h"
#include "infllm/backend/cpu/softmax-inl.h"
#include "infllm/ops/kernels.h"

INFLLM_CPU_BEGIN

struct ScorePlan {
  explicit ScorePlan(const ScoreParams& params)
      : heads_kv(params.pages.layout.kv_heads),
        group(params.heads_q / params.pages.layout.kv_heads),
        head_dim(params.pages.layout.head_dim),
        tile(tile_tokens(group)),
        rows(std::int64_t{tile} * group),
        tiles(max_tiles(params.batch, tile)),
        blocks(params.config.blocks_in(params.batch.max_kv_length)),
        windows(params.config.fine_windows(params.batch.max_kv_length)),
        segments(ceil_div(std::max<std::int64_t>(windows, 1), kScoreSegment)) {}

  std::int64_t heads_kv;
  int group;
  std::int64_t head_dim;
  int tile;
  std::int64_t rows;
  std::int64_t tiles;
  std::int64_t blocks;
  std::int64_t windows;
  std::int64_t segments;
};

template <class Num>
struct ScoreScratch {
  using Element = typename Num::Element;
  Element* q;              // [rows, D / per]
  Element* pooled;         // [D / per, 64]
  RunningSoftmax softmax;  // [rows]
  std::int32_t* row;       // [rows] 0, 1, 2, ...
  float* s;                // [max(kGroupRows, group), 64]

  template <class Taker>
  void take(Taker&& taker, const ScorePlan& plan) {
    taker(q, plan.rows * plan.head_dim / Num::kPer);
    taker(pooled, plan.head_dim / Num::kPer * kPageTokens);
    taker(softmax.m, plan.rows);
    taker(softmax.l, plan.rows * kLanes);
    taker(row, plan.rows);
    taker(s, std::max<std::int64_t>(kGroupRows, plan.group) * kPageTokens);
  }
};

template <class Num>
class Scorer {
 public:
  using Element = typename Num::Element;

  Scorer(const ScoreParams& params, const ScorePlan& plan)
      : p_(params),
        plan_(plan),
        map_(params.pages.layout),
        c_(static_cast<float>(params.scale * kLog2E)) {}

  void prefill_tile(std::int32_t index, std::int64_t head, std::int64_t tile_index,
                    const ScoreScratch<Num>& w) const {
    const Sequence sequence(p_.pages, p_.batch, index);
    if (!sequence.sparse || sequence.tokens <= 1) return;
    const TokenTile tile = token_tile(sequence, tile_index, plan_.tile);
    if (tile.tokens <= 0) return;
    for (int i = 0; i < tile.tokens; ++i) start_row(sequence, head, tile.first + i);
    if (p_.config.selects_all_at(tile.first)) return;
    load_rows(sequence, head, tile, w);
    const PooledKeys norm = normaliser(head);
    sum_up(sequence, norm, tile, 0, norm.visible(tile.first + tile.tokens - 1), w);
    for (std::int64_t r = 0; r < std::int64_t{tile.tokens} * plan_.group; ++r) {
      w.softmax.m[r] += std::log2(w.softmax.sum(r));
    }
    const std::int64_t last = scored_windows(sequence, tile.first);
    for (std::int64_t window = 0; window < last; window += kPageTokens) {
      const int count = static_cast<int>(std::min<std::int64_t>(kPageTokens, last - window));
      score_tile(sequence, head, tile, window, count, w, [&](int token, const float* sums) {
        pool(sequence, head, tile.first + token, window, count, sums);
      });
    }
    for (int i = 0; i < tile.tokens; ++i) finish_row(sequence, head, tile.first + i);
  }

  // Pass 1 of a sequence's only token: m and l of one segment of the normalising windows, to
  // partial[0 .. group) and partial[group .. 2 group).
  void decode_sum(std::int32_t index, std::int64_t head, std::int64_t segment,
                  const ScoreScratch<Num>& w, float* partial) const {
    const Sequence sequence(p_.pages, p_.batch, index);
    if (!scores_decode(sequence)) return;
    const TokenTile tile{sequence.length - std::int64_t{1}, 1};
    const PooledKeys norm = normaliser(head);
    const std::int64_t first = segment * kScoreSegment;
    const std::int64_t last = std::min(norm.visible(tile.first), first + kScoreSegment);
    if (first >= last) return;
    load_rows(sequence, head, tile, w);
    sum_up(sequence, norm, tile, first, last, w);
    for (int h = 0; h < plan_.group; ++h) {
      partial[h] = w.softmax.m[h];
      partial[plan_.group + h] = w.softmax.sum(h);
    }
  }

  // Pass 2: the group sums of one segment of fine windows.
  void decode_score(std::int32_t index, std::int64_t head, std::int64_t segment,
                    const ScoreScratch<Num>& w, const float* partials, float* sums) const {
    const Sequence sequence(p_.pages, p_.batch, index);
    if (!scores_decode(sequence)) return;
    const TokenTile tile{sequence.length - std::int64_t{1}, 1};
    const std::int64_t last =
        std::min(scored_windows(sequence, tile.first), (segment + 1) * kScoreSegment);
    if (segment * kScoreSegment >= last) return;
    load_rows(sequence, head, tile, w);
    const std::int64_t parts = ceil_div(normaliser(head).visible(tile.first), kScoreSegment);
    for (int h = 0; h < plan_.group; ++h) {
      const auto part = [&](std::int64_t s, int i) {
        return partials[(s * 2 + i) * plan_.group + h];
      };
      float m = kNoMaximum;
      for (std::int64_t s = 0; s < parts; ++s) m = std::max(m, part(s, 0));
      float l = 0;
      for (std::int64_t s = 0; s < parts; ++s) l += part(s, 1) * std::exp2(part(s, 0) - m);
      w.softmax.m[h] = m + std::log2(l);
    }
    for (std::int64_t window = segment * kScoreSegment; window < last; window += kPageTokens) {
      const int count = static_cast<int>(std::min<std::int64_t>(kPageTokens, last - window));
      score_tile(sequence, head, tile, window, count, w, [&](int, const float* tile_sums) {
        std::copy_n(tile_sums, count, sums + window);
      });
    }
  }

  // Pass 3: the maxima.
  void decode_pool(std::int32_t index, std::int64_t head, const float* sums) const {
    const Sequence sequence(p_.pages, p_.batch, index);
    if (!sequence.sparse || sequence.tokens != 1) return;
    const std::int64_t position = sequence.length - 1;
    start_row(sequence, head, position);
    if (!scores_decode(sequence)) return;
    pool(sequence, head, position, 0, static_cast<int>(scored_windows(sequence, position)), sums);
    finish_row(sequence, head, position);
  }

 private:
  PooledKeys fine(std::int64_t head) const { return fine_keys(p_.config, map_, head); }
  PooledKeys normaliser(std::int64_t head) const { return norm_keys(p_.config, map_, head); }
  bool scores_decode(const Sequence& sequence) const {
    return sequence.sparse && sequence.tokens == 1 &&
           !p_.config.selects_all_at(sequence.length - 1);
  }

  // The windows before this one are those that overlap blocks chosen freely by the token at
  // `position`. Unless the local window is a single block, it sees all of them.
  std::int64_t scored_windows(const Sequence& sequence, std::int64_t position) const {
    const std::int64_t free_blocks = p_.config.first_local_block(position);
    return std::min(free_blocks * kPageTokens / p_.config.kernel_stride,
                    p_.config.fine_windows(sequence.length));
  }

  float* score_row(const Sequence& sequence, std::int64_t head, std::int64_t position) const {
    const std::int64_t token = sequence.first_token + (position - sequence.first_position());
    return static_cast<float*>(p_.scores) + (head * p_.batch.num_tokens + token) * plan_.blocks;
  }

  // +inf in forced blocks (or in all causal ones) and -inf after the own one. A free block lies
  // before the own one, so some window overlaps it unless the sequence has none: 0, which every
  // visible window can only raise.
  void start_row(const Sequence& sequence, std::int64_t head, std::int64_t position) const {
    constexpr float kInf = std::numeric_limits<float>::infinity();
    float* row = score_row(sequence, head, position);
    const std::int64_t own = position / kPageTokens;
    const std::int64_t first_local =
        p_.config.selects_all_at(position) ? 0 : p_.config.first_local_block(position);
    const std::int64_t sink = std::min<std::int64_t>(p_.config.init_blocks, first_local);
    const bool any = p_.config.fine_windows(sequence.length) > 0;
    std::fill(row, row + sink, kInf);
    std::fill(row + sink, row + first_local, any ? 0.0f : -kInf);
    std::fill(row + first_local, row + own + 1, kInf);
    std::fill(row + own + 1, row + plan_.blocks, -kInf);
  }

  // Raises the row's free blocks to the group sums of `count` windows from `window` (a multiple of
  // 64) on: a window counts for the block it begins in and for those it reaches into.
  void pool(const Sequence& sequence, std::int64_t head, std::int64_t position, std::int64_t window,
            int count, const float* sums) const {
    const F32 d;
    const std::int64_t stride = p_.config.kernel_stride;
    const std::int64_t size = p_.config.kernel_size;
    const std::int64_t free_blocks = p_.config.first_local_block(position);
    float* row = score_row(sequence, head, position);
    int i = 0;
    if (stride * 4 == kPageTokens && size == 2 * stride) {  // the released windows, five a block
      for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
        const std::int64_t block = (window + i) / 4;
        if (block + kLanes >= free_blocks) break;
        VF32 w0, w1, w2, w3;
        hn::LoadInterleaved4(d, sums + i, w0, w1, w2, w3);
        const VF32 best = hn::Max(hn::Max(w0, w1), hn::Max(w2, w3));
        hn::StoreU(hn::Max(hn::LoadU(d, row + block), best), d, row + block);
        hn::StoreU(hn::Max(hn::LoadU(d, row + block + 1), w3), d, row + block + 1);
      }
    }
    for (; i < count; ++i) {
      const std::int64_t first = (window + i) * stride / kPageTokens;
      const std::int64_t last = ((window + i) * stride + size - 1) / kPageTokens;
      for (std::int64_t b = first; b <= std::min(last, free_blocks - 1); ++b) {
        row[b] = std::max(row[b], sums[i]);
      }
    }
  }

  // Rounding is monotone, so it may follow the maximum. Scores are 0 or more, or infinite.
  void finish_row(const Sequence& sequence, std::int64_t head, std::int64_t position) const {
    if (p_.config.score_rounding != ScoreRounding::kBF16) return;
    const F32 d;
    const U32 du;
    float* row = score_row(sequence, head, position);
    const std::int64_t free_blocks = p_.config.first_local_block(position);
    std::int64_t b = 0;
    for (; b + kLanes <= free_blocks; b += kLanes) {
      const VU32 bits = hn::BitCast(du, hn::LoadU(d, row + b));
      const VU32 tie = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
      const VU32 up = hn::Add(hn::Add(bits, hn::Set(du, 0x7fff)), tie);
      hn::StoreU(hn::BitCast(d, hn::And(up, hn::Set(du, 0xffff0000u))), d, row + b);
    }
    for (; b < free_blocks; ++b) row[b] = static_cast<float>(BF16(row[b]));
  }

  void load_rows(const Sequence& sequence, std::int64_t head, const TokenTile& tile,
                 const ScoreScratch<Num>& w) const {
    const std::int64_t token = sequence.first_token + (tile.first - sequence.first_position());
    const std::int64_t width = plan_.group * plan_.head_dim;
    for (int i = 0; i < tile.tokens; ++i) {
      to_elements<Num>(
          static_cast<const float*>(p_.q) + ((token + i) * plan_.heads_kv + head) * width, width,
          w.q + i * width / Num::kPer);
    }
    const std::int64_t rows = std::int64_t{tile.tokens} * plan_.group;
    for (std::int64_t r = 0; r < rows; ++r) w.row[r] = static_cast<std::int32_t>(r);
    w.softmax.reset(rows);
  }

  // Logits of rows [first, first + count) against the gathered tile.
  void multiply(std::int64_t first, int count, const ScoreScratch<Num>& w) const {
    const std::int64_t steps = plan_.head_dim / Num::kPer;
    for (int done = 0; done < count; done += kGroupRows) {
      const int n = std::min(kGroupRows, count - done);
      Product<Num> product;
      for (int i = 0; i < n; ++i) {
        product.a[i] = w.q + (first + done + i) * steps;
        product.c[i] = w.s + (done + i) * kPageTokens;
      }
      product.template run<false>(n, w.pooled, kPageTokens, kPageTokens, steps);
    }
  }

  // Pass 1: adds the windows [first, last), as far as each token sees them, to the running sums.
  void sum_up(const Sequence& sequence, const PooledKeys& keys, const TokenTile& tile,
              std::int64_t first, std::int64_t last, const ScoreScratch<Num>& w) const {
    const std::int64_t seen_by_all = keys.visible(tile.first);
    const int rows = tile.tokens * plan_.group;
    for (std::int64_t window = first; window < last; window += kPageTokens) {
      const int count = static_cast<int>(std::min<std::int64_t>(kPageTokens, last - window));
      gather_pooled<Num>(sequence, keys, plan_.head_dim, window, count, w.pooled);
      for (int row = 0; row < rows; row += kGroupRows) {
        const int n = std::min(kGroupRows, rows - row);
        multiply(row, n, w);
        if (window + kPageTokens > seen_by_all) {
          for (int i = 0; i < n; ++i) {
            const std::int64_t seen = keys.visible(tile.first + (row + i) / plan_.group) - window;
            mask_after(w.s + i * kPageTokens,
                       static_cast<int>(std::clamp<std::int64_t>(seen, 0, kPageTokens)));
          }
        }
        update_softmax<Num>(w.softmax, n, w.row + row, w.s, c_, nullptr, nullptr, 0);
      }
    }
  }

  // Pass 2: calls emit(token, sums [64]) with each token's group sums of `count` windows. m holds
  // the rows' log-sum-exp by now.
  template <class Emit>
  void score_tile(const Sequence& sequence, std::int64_t head, const TokenTile& tile,
                  std::int64_t window, int count, const ScoreScratch<Num>& w,
                  const Emit& emit) const {
    const F32 d;
    const VF32 c = hn::Set(d, c_);
    const PooledKeys keys = fine(head);
    gather_pooled<Num>(sequence, keys, plan_.head_dim, window, count, w.pooled);
    const int together = std::max(1, kGroupRows / plan_.group);
    for (int token = 0; token < tile.tokens; token += together) {
      const int tokens = std::min(together, tile.tokens - token);
      multiply(std::int64_t{token} * plan_.group, tokens * plan_.group, w);
      for (int t = 0; t < tokens; ++t) {
        const float* s = w.s + t * plan_.group * kPageTokens;
        const float* lse = w.softmax.m + (token + t) * plan_.group;
        HWY_ALIGN float sums[kPageTokens];
        for (int j = 0; j < kPageTokens; j += kLanes) {
          VF32 sum = hn::Zero(d);
          for (int h = 0; h < plan_.group; ++h) {
            const VF32 x = hn::LoadU(d, s + h * kPageTokens + j);
            sum = hn::Add(sum, exp2<true>(hn::MulSub(x, c, hn::Set(d, lse[h]))));
          }
          hn::Store(sum, d, sums + j);
        }
        const std::int64_t seen = keys.visible(tile.first + token + t) - window;
        if (seen < count) std::fill(sums + std::max<std::int64_t>(seen, 0), sums + count, 0.0f);
        emit(token + t, sums);
      }
    }
  }

  const ScoreParams& p_;
  const ScorePlan& plan_;
  PageMap map_;
  float c_;
};

template <class Num>
Status score_with(const Backend& backend, const ScoreParams& params,
                  std::span<std::byte> workspace) {
  const ScorePlan plan(params);
  const Scorer<Num> scorer(params, plan);
  Arena arena(workspace);
  const std::int64_t pairs = params.batch.num_sequences * plan.heads_kv;
  auto* partials = arena.take<float>(pairs * plan.segments * 2 * plan.group);
  auto* sums = arena.take<float>(pairs * plan.windows);
  auto* scratch = arena.take<ScoreScratch<Num>>(backend.pool->size());
  for (int worker = 0; worker < backend.pool->size(); ++worker) {
    scratch[worker].take(
        [&](auto*& pointer, std::int64_t count) {
          pointer = arena.take<std::remove_reference_t<decltype(*pointer)>>(count);
        },
        plan);
  }
  const auto index_of = [&](std::int64_t pair) {
    return static_cast<std::int32_t>(pair / plan.heads_kv);
  };
  if (params.batch.max_query_length > 1) {
    backend.pool->parallel_for(pairs * plan.tiles, [&](std::int64_t task, int worker) {
      const std::int64_t pair = task % pairs;
      scorer.prefill_tile(index_of(pair), pair % plan.heads_kv, plan.tiles - 1 - task / pairs,
                          scratch[worker]);
    });
  }
  const std::int32_t* start = params.batch.query_start;
  bool decodes = false;
  for (std::int32_t i = 0; i < params.batch.num_sequences; ++i) {
    decodes |= params.batch.sparse[i] != 0 && start[i + 1] - start[i] == 1;
  }
  if (!decodes) return {};
  const auto for_each_segment = [&](auto&& body) {
    backend.pool->parallel_for(pairs * plan.segments, [&](std::int64_t task, int worker) {
      const std::int64_t pair = task / plan.segments;
      body(pair, task % plan.segments, partials + pair * plan.segments * 2 * plan.group, worker);
    });
  };
  for_each_segment([&](std::int64_t pair, std::int64_t segment, float* partial, int worker) {
    scorer.decode_sum(index_of(pair), pair % plan.heads_kv, segment, scratch[worker],
                      partial + segment * 2 * plan.group);
  });
  for_each_segment([&](std::int64_t pair, std::int64_t segment, float* partial, int worker) {
    scorer.decode_score(index_of(pair), pair % plan.heads_kv, segment, scratch[worker], partial,
                        sums + pair * plan.windows);
  });
  backend.pool->parallel_for(pairs, [&](std::int64_t pair, int) {
    scorer.decode_pool(index_of(pair), pair % plan.heads_kv, sums + pair * plan.windows);
  });
  return {};
}

Status run_score(const Backend& backend, const ScoreParams& params,
                 std::span<std::byte> workspace) {
  return with_element(params.pages.layout.dtype, [&]<class Num>() -> Status {
    return score_with<Num>(backend, params, workspace);
  });
}

// Sized for floats, which need the most.
std::size_t score_bytes(const Backend& backend, const ScoreParams& params) {
  const ScorePlan plan(params);
  const std::int64_t pairs = params.batch.num_sequences * plan.heads_kv;
  ArenaSize size;
  size.take<float>(pairs * plan.segments * 2 * plan.group);
  size.take<float>(pairs * plan.windows);
  size.take<ScoreScratch<Floats>>(backend.pool->size());
  for (int worker = 0; worker < backend.pool->size(); ++worker) {
    ScoreScratch<Floats>{}.take([&]<class T>(T*&, std::int64_t count) { size.take<T>(count); },
                                plan);
  }
  return size.bytes();
}

INFLLM_CPU_END
