// SPDX-License-Identifier: Apache-2.0
//
// Causal attention over pages: one kernel for dense, sparse and decode.
//
// A task is (sequence, KV head, tile of neighbouring tokens); its rows are the tokens' query heads
// of that group. It walks the ascending union of its tokens' blocks, and for each block processes
// only the rows of the tokens that chose it, gathered into groups of kGroupRows:
//
//   logits = q K^T  (K in L1)   ->   running soft-max   ->   o += P V  (V in L1)
//
// So every loaded K and V tile serves all tokens of the tile that want it, no row computes a block
// it did not choose, and dense attention is the case in which all of them chose every block. The
// causal mask is needed in the tokens' own block alone, which tiles share (tiles.h).
//
// A sequence with one token would be one task per KV head. Its block list is cut into splits
// instead, whose unnormalised results are merged by their log-sum-exp.
#pragma once

#include <bit>

#include "infllm/backend/cpu/page.h"
#include "infllm/backend/cpu/softmax-inl.h"
#include "infllm/ops/kernels.h"

INFLLM_CPU_BEGIN

// A worker's rows and scratch.
template <class Num>
struct AttendScratch {
  using Element = typename Num::Element;
  Element* q;              // [rows, D / per]
  float* o;                // [rows, D]
  RunningSoftmax softmax;  // [rows]
  std::int32_t* row;       // [rows] the rows that the current block concerns
  std::int32_t* limit;     // [rows] their visible keys of it
  float* s;                // [kGroupRows, 64] logits
  Element* p;              // [kGroupRows, 64 / per] weights
  std::uint64_t* chosen;   // [N] bit i: token i of the tile chose the block

  template <class Taker>
  void take(Taker&& taker, std::int64_t rows, std::int64_t head_dim, std::int64_t blocks) {
    taker(q, rows * head_dim / Num::kPer);
    taker(o, rows * head_dim);
    taker(softmax.m, rows);
    taker(softmax.l, rows * kLanes);
    taker(row, rows);
    taker(limit, rows);
    taker(s, std::int64_t{kGroupRows} * kPageTokens);
    taker(p, std::int64_t{kGroupRows} * kPageTokens / Num::kPer);
    taker(chosen, blocks);
  }
};

// Sizes that all tasks of a call share.
struct AttendPlan {
  explicit AttendPlan(const AttendParams& params)
      : heads_kv(params.pages.layout.kv_heads),
        group(params.heads_q / params.pages.layout.kv_heads),
        head_dim(params.pages.layout.head_dim),
        tile(tile_tokens(group)),
        rows(std::int64_t{tile} * group),
        tiles(max_tiles(params.batch, tile)),
        blocks(ceil_div(params.batch.max_kv_length, kPageTokens)),
        splits(std::min<std::int64_t>(kMaxSplits, ceil_div(blocks, kMinSplitBlocks))) {}

  // Floats of one split's result: per row m, l and o.
  std::int64_t partial() const { return group * (head_dim + 2); }
  // Blocks of a split of a list.
  static std::int64_t split_blocks(std::int64_t blocks) {
    return std::max<std::int64_t>(kMinSplitBlocks, ceil_div(blocks, kMaxSplits));
  }

  std::int64_t heads_kv;
  int group;
  std::int64_t head_dim;
  int tile;
  std::int64_t rows;
  std::int64_t tiles;
  std::int64_t blocks;
  std::int64_t splits;
};

template <class Num>
class Attender {
 public:
  using Element = typename Num::Element;

  Attender(const AttendParams& params, const AttendPlan& plan)
      : p_(params),
        plan_(plan),
        map_(params.pages.layout),
        c_(static_cast<float>(params.scale * kLog2E)) {}

  void prefill_tile(std::int32_t index, std::int64_t head, std::int64_t tile_index,
                    const AttendScratch<Num>& w) const {
    const Sequence sequence(p_.pages, p_.batch, index);
    if (sequence.tokens <= 1) return;
    const TokenTile tile = token_tile(sequence, tile_index, plan_.tile);
    if (tile.tokens <= 0) return;
    load_rows(sequence, head, tile, w);
    const std::int64_t own = tile.first / kPageTokens;
    const bool sparse = sequence.sparse && p_.selection != nullptr;
    if (sparse) mark_chosen(sequence, head, tile, own, w);
    const std::uint64_t all = ~std::uint64_t{0} >> (64 - tile.tokens);
    int n = list_rows(all, w);
    std::uint64_t listed = all;
    const auto following = [&](std::int64_t block) {
      for (++block; sparse && block <= own && w.chosen[block] == 0;) ++block;
      return block;
    };
    for (std::int64_t block = following(-1); block <= own;) {
      const std::int64_t next = following(block);
      const std::uint64_t wanted = sparse ? w.chosen[block] : all;
      if (wanted != listed) n = list_rows(wanted, w);
      listed = wanted;
      if (block == own) {
        const int first = static_cast<int>(tile.first % kPageTokens);
        for (int i = 0; i < n; ++i) w.limit[i] = first + w.row[i] / plan_.group + 1;
      }
      visit(sequence, head, {.block = block, .next = next <= own ? next : -1}, n, block == own, w);
      block = next;
    }
    for (int token = 0; token < tile.tokens; ++token) {
      for (int h = 0; h < plan_.group; ++h) {
        const std::int64_t row = std::int64_t{token} * plan_.group + h;
        finish_row(sequence.first_token + (tile.first - sequence.first_position()) + token,
                   head * plan_.group + h, w.softmax.m[row], w.softmax.sum(row),
                   w.o + row * plan_.head_dim);
      }
    }
  }

  // One split of a sequence's only token.
  void decode_split(std::int32_t index, std::int64_t head, std::int64_t split,
                    const AttendScratch<Num>& w, float* partial) const {
    const Sequence sequence(p_.pages, p_.batch, index);
    if (sequence.tokens != 1) return;
    const BlockList list(*this, sequence, head);
    const std::int64_t per_split = AttendPlan::split_blocks(list.count);
    const std::int64_t last = std::min(list.count, (split + 1) * per_split);
    if (split * per_split >= last) return;
    const std::int64_t position = sequence.length - 1;
    load_rows(sequence, head, {position, 1}, w);
    const int n = list_rows(1, w);
    std::fill(w.limit, w.limit + n, static_cast<int>(position % kPageTokens) + 1);
    for (std::int64_t i = split * per_split; i < last; ++i) {
      visit(sequence, head, {.block = list[i], .next = i + 1 < last ? list[i + 1] : -1}, n,
            list[i] == position / kPageTokens, w);
    }
    for (int h = 0; h < plan_.group; ++h, partial += plan_.head_dim + 2) {
      partial[0] = w.softmax.m[h];
      partial[1] = w.softmax.sum(h);
      std::copy_n(w.o + h * plan_.head_dim, plan_.head_dim, partial + 2);
    }
  }

  // Adds up the splits of one token and KV head, in order: 2^(m_s - m) weighs split s.
  void merge_splits(std::int32_t index, std::int64_t head, float* partials) const {
    const Sequence sequence(p_.pages, p_.batch, index);
    if (sequence.tokens != 1) return;
    const std::int64_t count = BlockList(*this, sequence, head).count;
    const std::int64_t splits = ceil_div(count, AttendPlan::split_blocks(count));
    const std::int64_t width = plan_.head_dim + 2;
    for (int h = 0; h < plan_.group; ++h) {
      float* total = partials + h * width;
      float m = kNoMaximum;
      for (std::int64_t s = 0; s < splits; ++s) m = std::max(m, total[s * plan_.partial()]);
      float l = 0;
      for (std::int64_t s = 0; s < splits; ++s) {
        const float* part = total + s * plan_.partial();
        const float weight = std::exp2(part[0] - m);
        l += weight * part[1];
        for (std::int64_t i = 2; i < width; ++i) {
          total[i] = (s == 0 ? 0 : total[i]) + weight * part[i];
        }
      }
      finish_row(sequence.first_token, head * plan_.group + h, m, l, total + 2);
    }
  }

 private:
  // The blocks that the only token of a sequence attends to.
  struct BlockList {
    BlockList(const Attender& a, const Sequence& sequence, std::int64_t head)
        : count(ceil_div(sequence.length, kPageTokens)) {
      if (!sequence.sparse || a.p_.selection == nullptr) return;
      row = a.selection_row(head, sequence.first_token);
      count = std::find(row, row + a.p_.columns, -1) - row;
    }
    std::int64_t operator[](std::int64_t i) const { return row == nullptr ? i : row[i]; }

    const std::int32_t* row = nullptr;
    std::int64_t count;
  };

  const std::int32_t* selection_row(std::int64_t head, std::int64_t token) const {
    return p_.selection + (head * p_.batch.num_tokens + token) * p_.columns;
  }

  void load_rows(const Sequence& sequence, std::int64_t head, const TokenTile& tile,
                 const AttendScratch<Num>& w) const {
    const std::int64_t token = sequence.first_token + (tile.first - sequence.first_position());
    const std::int64_t width = plan_.group * plan_.head_dim;  // the heads of a group are neighbours
    for (int i = 0; i < tile.tokens; ++i) {
      to_elements<Num>(
          static_cast<const float*>(p_.q) + ((token + i) * plan_.heads_kv + head) * width, width,
          w.q + i * width / Num::kPer);
    }
    const std::int64_t rows = std::int64_t{tile.tokens} * plan_.group;
    std::fill(w.o, w.o + rows * plan_.head_dim, 0.0f);
    w.softmax.reset(rows);
  }

  void mark_chosen(const Sequence& sequence, std::int64_t head, const TokenTile& tile,
                   std::int64_t own, const AttendScratch<Num>& w) const {
    std::fill(w.chosen, w.chosen + own + 1, std::uint64_t{0});
    const std::int64_t token = sequence.first_token + (tile.first - sequence.first_position());
    for (int i = 0; i < tile.tokens; ++i) {
      const std::int32_t* row = selection_row(head, token + i);
      for (std::int32_t j = 0; j < p_.columns && row[j] >= 0 && row[j] <= own; ++j) {
        w.chosen[row[j]] |= std::uint64_t{1} << i;
      }
    }
  }

  int list_rows(std::uint64_t tokens, const AttendScratch<Num>& w) const {
    int n = 0;
    for (; tokens != 0; tokens &= tokens - 1) {
      const int first = std::countr_zero(tokens) * plan_.group;
      for (int h = 0; h < plan_.group; ++h) w.row[n++] = first + h;
    }
    return n;
  }

  struct Visit {
    std::int64_t block;
    std::int64_t next;  // the block after it, -1 at the end
  };

  // The rows w.row[0 .. n) attend to one block. Meanwhile the next block's tiles come closer: a row
  // group of one token is done with a tile sooner than memory delivers the next one.
  void visit(const Sequence& sequence, std::int64_t head, Visit at, int n, bool masked,
             const AttendScratch<Num>& w) const {
    const std::int64_t dim = plan_.head_dim;
    const std::int64_t plane = kPageTokens * dim / Num::kPer;
    const auto* keys = sequence.plane<const Element>(at.block, map_.key(head));
    const auto* values = sequence.plane<const Element>(at.block, map_.value(head));
    Upcoming next_keys;
    Upcoming next_values;
    if (at.next >= 0) {
      const auto bytes = plane * static_cast<std::int64_t>(sizeof(Element));
      next_keys.from = sequence.plane<const std::byte>(at.next, map_.key(head));
      next_keys.end = next_keys.from + bytes;
      next_values.from = sequence.plane<const std::byte>(at.next, map_.value(head));
      next_values.end = next_values.from + bytes;
    }
    for (int first = 0; first < n; first += kGroupRows) {
      const int count = std::min(kGroupRows, n - first);
      const std::int32_t* row = w.row + first;
      Product<Num> product;
      for (int i = 0; i < count; ++i) {
        product.a[i] = w.q + row[i] * (dim / Num::kPer);
        product.c[i] = w.s + i * kPageTokens;
      }
      product.template run<false>(count, keys, kPageTokens, kPageTokens, dim / Num::kPer,
                                  first == 0 ? next_keys : Upcoming{});
      if (masked) {
        for (int i = 0; i < count; ++i) mask_after(w.s + i * kPageTokens, w.limit[first + i]);
      }
      update_softmax<Num>(w.softmax, count, row, w.s, c_, w.p, w.o, dim);
      for (int i = 0; i < count; ++i) {
        product.a[i] = w.p + i * (kPageTokens / Num::kPer);
        product.c[i] = w.o + row[i] * dim;
      }
      product.template run<true>(count, values, dim, dim, kPageTokens / Num::kPer,
                                 first == 0 ? next_values : Upcoming{});
    }
  }

  void finish_row(std::int64_t token, std::int64_t head, float m, float l, const float* o) const {
    float* out = static_cast<float*>(p_.o) + (token * p_.heads_q + head) * plan_.head_dim;
    if (l > 0) {
      const float inverse = 1 / l;
      for (std::int64_t i = 0; i < plan_.head_dim; ++i) out[i] = o[i] * inverse;
    } else {  // nothing was seen; a decode step then has not even written o
      std::fill(out, out + plan_.head_dim, 0.0f);
    }
    if (p_.lse == nullptr) return;
    static_cast<float*>(p_.lse)[head * p_.batch.num_tokens + token] =
        l > 0 ? static_cast<float>(m * kLn2) + std::log(l)
              : -std::numeric_limits<float>::infinity();
  }

  const AttendParams& p_;
  const AttendPlan& plan_;
  PageMap map_;
  float c_;
};

template <class Num>
Status attend_with(const Backend& backend, const AttendParams& params,
                   std::span<std::byte> workspace) {
  const AttendPlan plan(params);
  const Attender<Num> attender(params, plan);
  Arena arena(workspace);
  const std::int64_t pairs = params.batch.num_sequences * plan.heads_kv;
  auto* partials = arena.take<float>(pairs * plan.splits * plan.partial());
  auto* scratch = arena.take<AttendScratch<Num>>(backend.pool->size());
  for (int worker = 0; worker < backend.pool->size(); ++worker) {
    scratch[worker].take(
        [&](auto*& pointer, std::int64_t count) {
          pointer = arena.take<std::remove_reference_t<decltype(*pointer)>>(count);
        },
        plan.rows, plan.head_dim, plan.blocks);
  }
  const auto index_of = [&](std::int64_t pair) {
    return static_cast<std::int32_t>(pair / plan.heads_kv);
  };
  if (params.batch.max_query_length > 1) {  // late tiles, the long ones, first
    backend.pool->parallel_for(pairs * plan.tiles, [&](std::int64_t task, int worker) {
      const std::int64_t pair = task % pairs;
      attender.prefill_tile(index_of(pair), pair % plan.heads_kv, plan.tiles - 1 - task / pairs,
                            scratch[worker]);
    });
  }
  const std::int32_t* start = params.batch.query_start;
  bool decodes = false;
  for (std::int32_t i = 0; i < params.batch.num_sequences; ++i) {
    decodes |= start[i + 1] - start[i] == 1;
  }
  if (decodes) {
    backend.pool->parallel_for(pairs * plan.splits, [&](std::int64_t task, int worker) {
      const std::int64_t pair = task / plan.splits;
      attender.decode_split(index_of(pair), pair % plan.heads_kv, task % plan.splits,
                            scratch[worker], partials + task * plan.partial());
    });
    backend.pool->parallel_for(pairs, [&](std::int64_t pair, int) {
      attender.merge_splits(index_of(pair), pair % plan.heads_kv,
                            partials + pair * plan.splits * plan.partial());
    });
  }
  return {};
}

Status run_attend(const Backend& backend, const AttendParams& params,
                  std::span<std::byte> workspace) {
  return with_element(params.pages.layout.dtype, [&]<class Num>() -> Status {
    return attend_with<Num>(backend, params, workspace);
  });
}

// Sized for floats, which need the most.
std::size_t attend_bytes(const Backend& backend, const AttendParams& params) {
  const AttendPlan plan(params);
  ArenaSize size;
  size.take<float>(params.batch.num_sequences * plan.heads_kv * plan.splits * plan.partial());
  size.take<AttendScratch<Floats>>(backend.pool->size());
  for (int worker = 0; worker < backend.pool->size(); ++worker) {
    AttendScratch<Floats>{}.take([&]<class T>(T*&, std::int64_t count) { size.take<T>(count); },
                                 plan.rows, plan.head_dim, plan.blocks);
  }
  return size.bytes();
}

INFLLM_CPU_END
