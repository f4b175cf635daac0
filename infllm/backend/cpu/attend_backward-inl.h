// SPDX-License-Identifier: Apache-2.0
//
// Gradients of attention over pages (ops/attend.h), without atomics: the same bits for any number
// of threads. Two passes, each of which owns what it writes:
//
//   tokens    a task is (sequence, KV head, tile of tokens), walks the union of their blocks as the
//             forward pass does, and sums dQ = scale sum dS K
//   blocks    a task is (sequence, KV head, block), walks the tokens that chose the block, in
//             order, and sums dK = scale sum dS^T Q and dV = sum P^T dO
//
// Both compute P = exp(x - LSE) and dS = P (dO V^T - Delta) anew, kGroupRows rows at a time; the
// second one's products read the transposed weights, so its rows are gathered and packed.
// Who chose a block is an inverse index of the selection (Choosers); in a dense sequence it is
// everybody from the block on.
#pragma once

#include <bit>

#include "infllm/backend/cpu/choosers.h"
#include "infllm/backend/cpu/page.h"
#include "infllm/backend/cpu/softmax-inl.h"
#include "infllm/backend/cpu/turn-inl.h"
#include "infllm/ops/kernels.h"

INFLLM_CPU_BEGIN

// What the gradient needs to know of a row besides q and dO.
struct RowStatistics {
  float lse;
  float delta;  // sum dO O - dLSE
};

// A worker's rows and scratch.
template <class Num>
struct BackwardScratch {
  using Element = typename Num::Element;
  Element* q;             // [rows, D / per]
  Element* grad_o;        // [rows, D / per]
  RowStatistics* stats;   // [rows]
  float* grad_q;          // [rows, D]
  std::int32_t* row;      // [rows] the rows that the current block concerns
  std::int32_t* limit;    // [rows] their visible keys of it
  std::uint64_t* chosen;  // [N] bit i: token i of the tile chose the block
  Element* turned_key;    // [64 / per, D] a block's keys laid out as values are
  Element* turned_value;  // [D / per, 64] its values laid out as keys are
  float* p;               // [kGroupRows, 64] logits, then weights
  float* grad_x;          // [kGroupRows, 64] dO V^T, then dS
  float* piece;           // [kGroupRows, 64] of a sum that is taken in pieces
  Element* weights;       // dS [kGroupRows, 64 / per] or P^T or dS^T [64, kGroupRows / per]
  Element* pairs;         // [kGroupRows / per, D] rows of q or dO laid out as values are
  float* grad_k;          // [64, D]
  float* grad_v;          // [64, D]

  template <class Taker>
  void take(Taker&& taker, std::int64_t rows, std::int64_t dim, std::int64_t blocks) {
    taker(q, rows * dim / Num::kPer);
    taker(grad_o, rows * dim / Num::kPer);
    taker(stats, rows);
    taker(grad_q, rows * dim);
    taker(row, rows);
    taker(limit, rows);
    taker(chosen, blocks);
    taker(turned_key, kPageTokens * dim / Num::kPer);
    taker(turned_value, kPageTokens * dim / Num::kPer);
    taker(p, std::int64_t{kGroupRows} * kPageTokens);
    taker(grad_x, std::int64_t{kGroupRows} * kPageTokens);
    taker(piece, std::int64_t{kGroupRows} * kPageTokens);
    taker(weights, std::int64_t{kGroupRows} * kPageTokens / Num::kPer);
    taker(pairs, kGroupRows * dim / Num::kPer);
    taker(grad_k, kPageTokens * dim);
    taker(grad_v, kPageTokens * dim);
  }
};

struct BackwardPlan {
  explicit BackwardPlan(const AttendParams& params)
      : heads_kv(params.pages.layout.kv_heads),
        group(params.heads_q / params.pages.layout.kv_heads),
        dim(params.pages.layout.head_dim),
        tile(tile_tokens(group)),
        rows(std::max<std::int64_t>(std::int64_t{tile} * group, kGroupRows)),
        tiles(max_tiles(params.batch, tile)),
        blocks(ceil_div(params.batch.max_kv_length, kPageTokens)) {}

  std::int64_t heads_kv;
  int group;
  std::int64_t dim;
  int tile;
  std::int64_t rows;
  std::int64_t tiles;
  std::int64_t blocks;
};

template <class Num>
class BackwardAttender {
 public:
  using Element = typename Num::Element;
  using Scratch = BackwardScratch<Num>;

  BackwardAttender(const AttendBackwardParams& params, const BackwardPlan& plan,
                   const Choosers& choosers, RowStatistics* stats)
      : p_(params),
        f_(params.forward),
        plan_(plan),
        choosers_(choosers),
        stats_(stats),
        map_(params.forward.pages.layout) {}

  // Of one token's rows. Delta is of dO as the products see it, so that sum P (dO V - Delta) = 0.
  void take_statistics(std::int64_t token) const {
    for (std::int64_t head = 0; head < f_.heads_q; ++head) {
      const std::int64_t row = token * f_.heads_q + head;
      const std::int64_t stat = head * f_.batch.num_tokens + token;
      const float* grad_o = static_cast<const float*>(p_.grad_o) + row * plan_.dim;
      const float* o = static_cast<const float*>(f_.o) + row * plan_.dim;
      double delta = 0;  // in dS it meets a number of its own size, so its digits count
      for (std::int64_t d = 0; d < plan_.dim; ++d) {
        delta += static_cast<double>(Num::get(Num::make(grad_o + d, 0), 0)) * o[d];
      }
      if (p_.grad_lse != nullptr) delta -= static_cast<const float*>(p_.grad_lse)[stat];
      stats_[row] = {static_cast<const float*>(f_.lse)[stat], static_cast<float>(delta)};
    }
  }

  // dQ of one tile of tokens.
  void tile_gradient(std::int32_t index, std::int64_t head, std::int64_t tile_index,
                     const Scratch& w) const {
    const Sequence sequence(f_.pages, f_.batch, index);
    const TokenTile tile = token_tile(sequence, tile_index, plan_.tile);
    if (tile.tokens <= 0) return;
    const std::int64_t token = sequence.first_token + (tile.first - sequence.first_position());
    const std::int64_t rows = std::int64_t{tile.tokens} * plan_.group;
    for (std::int64_t r = 0; r < rows; ++r) {
      load_row(token + r / plan_.group, head * plan_.group + r % plan_.group, r, w);
    }
    std::fill_n(w.grad_q, rows * plan_.dim, 0.0f);
    const std::int64_t own = tile.first / kPageTokens;
    const bool sparse = sequence.sparse && f_.selection != nullptr;
    if (sparse) mark_chosen(head, token, tile.tokens, own, w);
    const std::uint64_t all = ~std::uint64_t{0} >> (64 - tile.tokens);
    for (std::int64_t block = 0; block <= own; ++block) {
      const std::uint64_t wanted = sparse ? w.chosen[block] : all;
      if (wanted == 0) continue;
      turn(sequence, head, block, w);
      const int n = list_rows(wanted, block == own, static_cast<int>(tile.first % kPageTokens), w);
      for (int first = 0; first < n; first += kGroupRows) {
        add_grad_q(sequence, head, block, w.row + first, w.limit + first,
                   std::min(kGroupRows, n - first), w);
      }
    }
    auto* out = static_cast<float*>(p_.grad_q);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t at =
          (token + r / plan_.group) * f_.heads_q + head * plan_.group + r % plan_.group;
      write_row(w.grad_q + r * plan_.dim, f_.scale, out + at * plan_.dim);
    }
  }

  // dK and dV of one block, whose first key is row `first_key` of the packed arrays.
  void block_gradient(std::int32_t index, std::int64_t head, std::int64_t block,
                      std::int64_t first_key, const Scratch& w) const {
    const Sequence sequence(f_.pages, f_.batch, index);
    const std::int64_t first_position = block * kPageTokens;
    const auto keys = std::min<std::int64_t>(kPageTokens, sequence.length - first_position);
    if (keys <= 0) return;
    std::fill_n(w.grad_k, kPageTokens * plan_.dim, 0.0f);
    std::fill_n(w.grad_v, kPageTokens * plan_.dim, 0.0f);
    const auto tokens = choosers_.of(sequence, index, head, block);
    const std::int64_t rows = tokens.count * plan_.group;
    if (rows > 0) turn(sequence, head, block, w);
    for (std::int64_t first = 0; first < rows; first += kGroupRows) {
      const int n = static_cast<int>(std::min<std::int64_t>(kGroupRows, rows - first));
      for (int i = 0; i < n; ++i) {
        const std::int64_t token = tokens[(first + i) / plan_.group];
        load_row(token, head * plan_.group + (first + i) % plan_.group, i, w);
        const std::int64_t position = sequence.first_position() + token - sequence.first_token;
        w.row[i] = i;
        w.limit[i] =
            static_cast<int>(std::min<std::int64_t>(kPageTokens, position - first_position + 1));
      }
      weigh(sequence, head, block, w.row, w.limit, n, w);
      add_turned<Num>(w.p, w.grad_o, n, plan_.dim, w.weights, w.pairs, w.grad_v);
      add_turned<Num>(w.grad_x, w.q, n, plan_.dim, w.weights, w.pairs, w.grad_k);
    }
    for (std::int64_t t = 0; t < keys; ++t) {
      const std::int64_t at =
          ((first_key + first_position + t) * plan_.heads_kv + head) * plan_.dim;
      write_row(w.grad_k + t * plan_.dim, f_.scale, static_cast<float*>(p_.grad_k) + at);
      write_row(w.grad_v + t * plan_.dim, 1, static_cast<float*>(p_.grad_v) + at);
    }
  }

 private:
  // Row r of the scratch.
  void load_row(std::int64_t token, std::int64_t head, std::int64_t r, const Scratch& w) const {
    const std::int64_t row = token * f_.heads_q + head;
    const std::int64_t width = plan_.dim / Num::kPer;
    to_elements<Num>(static_cast<const float*>(f_.q) + row * plan_.dim, plan_.dim, w.q + r * width);
    to_elements<Num>(static_cast<const float*>(p_.grad_o) + row * plan_.dim, plan_.dim,
                     w.grad_o + r * width);
    w.stats[r] = stats_[row];
  }

  void mark_chosen(std::int64_t head, std::int64_t token, int tokens, std::int64_t own,
                   const Scratch& w) const {
    std::fill(w.chosen, w.chosen + own + 1, std::uint64_t{0});
    for (int i = 0; i < tokens; ++i) {
      const std::int32_t* row =
          f_.selection + (head * f_.batch.num_tokens + token + i) * f_.columns;
      for (std::int32_t j = 0; j < f_.columns && row[j] >= 0 && row[j] <= own; ++j) {
        w.chosen[row[j]] |= std::uint64_t{1} << i;
      }
    }
  }

  int list_rows(std::uint64_t tokens, bool own, int first_slot, const Scratch& w) const {
    int n = 0;
    for (; tokens != 0; tokens &= tokens - 1) {
      const int token = std::countr_zero(tokens);
      for (int h = 0; h < plan_.group; ++h, ++n) {
        w.row[n] = token * plan_.group + h;
        w.limit[n] = own ? first_slot + token + 1 : kPageTokens;
      }
    }
    return n;
  }

  const Element* keys(const Sequence& sequence, std::int64_t head, std::int64_t block) const {
    return sequence.plane<const Element>(block, map_.key(head));
  }

  void turn(const Sequence& sequence, std::int64_t head, std::int64_t block,
            const Scratch& w) const {
    turn_keys<Num>(keys(sequence, head, block), plan_.dim, w.turned_key);
    turn_values<Num>(sequence.plane<const Element>(block, map_.value(head)), plan_.dim,
                     w.turned_value);
  }

  // to [n, 64] = rows (keys)^T. Floats have no other error than that of adding up, and an error of
  // a logit is one of its weight's share, so their sums are taken in pieces.
  void multiply(const Element* rows, const Element* keys, const std::int32_t* row, int n, float* to,
                const Scratch& w) const {
    const std::int64_t width = plan_.dim / Num::kPer;
    constexpr std::int64_t kPieces = Num::kPer == 1 ? 4 : 1;
    const std::int64_t steps = width / kPieces;
    Product<Num> product{};
    for (std::int64_t piece = 0; piece < kPieces; ++piece) {
      float* sums = piece == 0 ? to : w.piece;
      for (int i = 0; i < n; ++i) {
        product.a[i] = rows + row[i] * width + piece * steps;
        product.c[i] = sums + i * kPageTokens;
      }
      product.template run<false>(n, keys + piece * steps * kPageTokens, kPageTokens, kPageTokens,
                                  steps);
      for (std::int64_t i = 0; piece > 0 && i < n * kPageTokens; ++i) to[i] += sums[i];
    }
  }

  // P and dS of the rows row[0 .. n), in w.p and w.grad_x.
  void weigh(const Sequence& sequence, std::int64_t head, std::int64_t block,
             const std::int32_t* row, const std::int32_t* limit, int n, const Scratch& w) const {
    multiply(w.q, keys(sequence, head, block), row, n, w.p, w);
    multiply(w.grad_o, w.turned_value, row, n, w.grad_x, w);
    const F32 d;
    // x - LSE in natural units: a log2(e) within LSE would cost another rounding of a large number.
    const VF32 scale = hn::Set(d, f_.scale);
    const VF32 log2e = hn::Set(d, static_cast<float>(kLog2E));
    for (int i = 0; i < n; ++i) {
      float* p = w.p + i * kPageTokens;
      float* grad_x = w.grad_x + i * kPageTokens;
      if (limit[i] < kPageTokens) mask_after(p, limit[i]);
      const VF32 lse = hn::Set(d, w.stats[row[i]].lse);
      const VF32 delta = hn::Set(d, w.stats[row[i]].delta);
      for (int j = 0; j < kPageTokens; j += kLanes) {
        const VF32 weight = exp2(hn::Mul(hn::MulSub(hn::LoadU(d, p + j), scale, lse), log2e));
        hn::StoreU(weight, d, p + j);
        hn::StoreU(hn::Mul(weight, hn::Sub(hn::LoadU(d, grad_x + j), delta)), d, grad_x + j);
      }
    }
  }

  // dQ += dS K.
  void add_grad_q(const Sequence& sequence, std::int64_t head, std::int64_t block,
                  const std::int32_t* row, const std::int32_t* limit, int n,
                  const Scratch& w) const {
    weigh(sequence, head, block, row, limit, n, w);
    to_elements<Num>(w.grad_x, std::int64_t{n} * kPageTokens, w.weights);
    Product<Num> product;
    for (int i = 0; i < n; ++i) {
      product.a[i] = w.weights + i * (kPageTokens / Num::kPer);
      product.c[i] = w.grad_q + row[i] * plan_.dim;
    }
    product.template run<true>(n, w.turned_key, plan_.dim, plan_.dim, kPageTokens / Num::kPer);
  }

  void write_row(const float* from, float factor, float* to) const {
    for (std::int64_t d = 0; d < plan_.dim; ++d) to[d] = from[d] * factor;
  }

  const AttendBackwardParams& p_;
  const AttendParams& f_;
  const BackwardPlan& plan_;
  const Choosers& choosers_;
  RowStatistics* stats_;  // [T, Hq]
  PageMap map_;
};

template <class Num>
Status attend_backward_with(const Backend& backend, const AttendBackwardParams& params,
                            std::span<std::byte> workspace) {
  const AttendParams& forward = params.forward;
  const BackwardPlan plan(forward);
  Arena arena(workspace);
  const Choosers choosers = Choosers::of_selection(backend, forward, arena);
  auto* first_key = arena.take<std::int64_t>(forward.batch.num_sequences);
  auto* stats = arena.take<RowStatistics>(std::int64_t{forward.batch.num_tokens} * forward.heads_q);
  auto* scratch = arena.take<BackwardScratch<Num>>(backend.pool->size());
  for (int worker = 0; worker < backend.pool->size(); ++worker) {
    scratch[worker].take(
        [&](auto*& pointer, std::int64_t count) {
          pointer = arena.take<std::remove_reference_t<decltype(*pointer)>>(count);
        },
        plan.rows, plan.dim, plan.blocks);
  }
  std::int64_t keys = 0;
  for (std::int32_t i = 0; i < forward.batch.num_sequences; ++i) {
    first_key[i] = keys;
    keys += forward.batch.kv_length[i];
  }
  const BackwardAttender<Num> attender(params, plan, choosers, stats);
  const std::int64_t pairs = forward.batch.num_sequences * plan.heads_kv;
  const auto index_of = [&](std::int64_t pair) {
    return static_cast<std::int32_t>(pair / plan.heads_kv);
  };
  backend.pool->parallel_for(forward.batch.num_tokens,
                             [&](std::int64_t token, int) { attender.take_statistics(token); });
  // The long ones first: late tiles see most blocks, early blocks are seen by most tokens.
  if (forward.batch.num_tokens > 0) {
    backend.pool->parallel_for(pairs * plan.tiles, [&](std::int64_t task, int worker) {
      const std::int64_t pair = task % pairs;
      attender.tile_gradient(index_of(pair), pair % plan.heads_kv, plan.tiles - 1 - task / pairs,
                             scratch[worker]);
    });
  }
  backend.pool->parallel_for(pairs * plan.blocks, [&](std::int64_t task, int worker) {
    const std::int64_t pair = task % pairs;
    attender.block_gradient(index_of(pair), pair % plan.heads_kv, task / pairs,
                            first_key[index_of(pair)], scratch[worker]);
  });
  return {};
}

Status run_attend_backward(const Backend& backend, const AttendBackwardParams& params,
                           std::span<std::byte> workspace) {
  return with_element(params.forward.pages.layout.dtype, [&]<class Num>() -> Status {
    return attend_backward_with<Num>(backend, params, workspace);
  });
}

// Sized for floats, which need the most.
std::size_t attend_backward_bytes(const Backend& backend, const AttendBackwardParams& params) {
  const BackwardPlan plan(params.forward);
  ArenaSize size;
  Choosers::take(params.forward, size);
  size.take<std::int64_t>(params.forward.batch.num_sequences);
  size.take<RowStatistics>(std::int64_t{params.forward.batch.num_tokens} * params.forward.heads_q);
  size.take<BackwardScratch<Floats>>(backend.pool->size());
  for (int worker = 0; worker < backend.pool->size(); ++worker) {
    BackwardScratch<Floats>{}.take([&]<class T>(T*&, std::int64_t count) { size.take<T>(count); },
                                   plan.rows, plan.dim, plan.blocks);
  }
  return size.bytes();
}

INFLLM_CPU_END
