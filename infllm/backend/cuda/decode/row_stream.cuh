// SPDX-License-Identifier: Apache-2.0
//
// A whole step (step_args.cuh) of more rows: what one thread block does, one part of one row, from
// queries to outputs. Its warps read one stream each (warp_stream.cuh), which never stops while
// there is anything known to be read: what parts tell each other (exchange.cuh) and the choice of
// blocks happen beside it.
#pragma once

#include "infllm/backend/cuda/decode/merge.cuh"
#include "infllm/backend/cuda/decode/step_part.cuh"
#include "infllm/backend/cuda/decode/warp_stream.cuh"

namespace infllm::cuda::decode {

inline constexpr int kMaxStreamParts = kStepThreads / kRowHeads;
static_assert(kPieceRows == kItemTiles * kTileRows);  // a piece of fine windows is an item

template <typename T, int kDim>
struct StreamShared {
  using Stream = WarpStream<T, kDim>;
  union {
    Piece<T, kDim> stages[kStepWarps][Stream::kStages];
    WarpResults<kDim, kStepWarps> merge;  // when the rings are done with
  };
  T q[kRowHeads * kDim];
  typename Stream::Shared streams[kStepWarps];
  StepShared step;
  std::int32_t list[kMaxColumns];  // the blocks chosen freely
  int number;                      // of the thread block
  TopCandidatesShared<kStepThreads> select;
};

template <typename T, int kDim>
class RowStream : private StepPart {
 public:
  using S = StreamShared<T, kDim>;
  using Stream = typename S::Stream;
  using Stage = typename Stream::Stage;
  using Results = PartResults<kDim, kStepThreads>;

  // planes: {64, 64 tokens, panels, keys and values of all heads, pages}.
  __device__ __forceinline__ RowStream(const StepArgs& args, const CUtensorMap* planes,
                                       const Sequence& sequence, int row, int head_kv, int part,
                                       S& shared)
      : StepPart(args, sequence, row, head_kv, part, shared.step),
        shared_(shared),
        stream_(args.pool, sequence, forced_, head_kv, WarpPlace{place_, places_}, normaliser_,
                fine_, items_, planes, shared.list, shared.stages[warp_], shared.streams[warp_]) {}

  // What needs only the batch's arrays.
  __device__ __forceinline__ void prepare() {
    warm();
    shared_.select.clear();
    stream_.prepare(a_.settled);
  }

  __device__ __forceinline__ void run() {
    const std::uint32_t count = Results::look_at_count(result_words(), parts_);
    load_queries();
    const Results results(result_words(), part_, parts_, count);
    results.clear();  // while the first keys come
    const int choose_at =
        chooses() ? max(stream_.fine_end, stream_.forced_end - Stream::kStages) : -1;
#pragma unroll 1
    for (int n = 0;; ++n) {
      if (n == stream_.normaliser_end && chooses()) {
        publish_normalisers();
        gather_normalisers<kMaxStreamParts>();
      }
      if (n == stream_.fine_end) attention_.template start<Stage>(shared_.q, a_.scale);
      if (n == choose_at) {
        choose();
        stream_.chosen(n);
      }
      if (n == stream_.end) break;
      int exist;
      const auto& stage = stream_.take(exist);
      if (n >= stream_.fine_end) {
        if (exist > 0) attend(stage, exist);
      } else if (n >= stream_.normaliser_end) {
        score_item(stage, static_cast<unsigned>(exist), stream_.fine_piece(n));
      } else {
        add_piece(stage, static_cast<unsigned>(exist));
      }
      // The copy engine is next to write where lanes did.
      if (n < stream_.fine_end && n + Stream::kStages >= stream_.fine_end) {
        tile::fence_async_proxy();
      }
      __syncwarp();  // the stage is used up
      stream_.fill(n + 1);
    }
    merge_warps(results);
    merge_parts(results);
    if (warp_ > 0) return;
    results.count();
    if (chooses()) clear_cells(32 * part_ + lane_, 32 * parts_);
  }

 private:
  // The queries and the counts of results into L2.
  __device__ __forceinline__ void warm() const {
    const T* const q = queries<T, kDim>(warp_ == 0 ? a_.q : a_.q_score);
    if (warp_ < 2 && lane_ == 0) prefetch(q, group_ * kDim * static_cast<int>(sizeof(T)));
    if (warp_ == 2 && lane_ < parts_)
      prefetch(result_words() + lane_ * kPartWords + 2 * kSetWords, 32);
  }

  // Queries to score with into registers, those to attend with into shared memory, and the first
  // pieces on their way.
  __device__ __forceinline__ void load_queries() {
    constexpr int kPieces = kRowHeads * Stage::kPieces;
    static_assert(kPieces <= kStepThreads);
    const int row = static_cast<int>(threadIdx.x) / Stage::kPieces;
    const int piece = static_cast<int>(threadIdx.x) % Stage::kPieces;
    uint4 attend = make_uint4(0, 0, 0, 0);
    if (row < group_) {
      attend = __ldcg(reinterpret_cast<const uint4*>(queries<T, kDim>(a_.q) + row * kDim +
                                                     piece * kPieceElements));
    }
    if (chooses()) score_q_.load(queries<T, kDim>(a_.q_score), group_);
    stream_.fill(0);
    if (row < kRowHeads) {
      *reinterpret_cast<uint4*>(shared_.q + Stage::at(row, piece)) = attend;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void attend(const Stage& stage, int tokens) {
    if (tokens < kSliceTokens) {  // what is behind them may be anything, and has the weight 0
      for (int i = lane_; i < kSliceTokens * Stage::kPieces; i += 32) {
        const int row = i / Stage::kPieces;
        if (row >= tokens) {
          *reinterpret_cast<uint4*>(const_cast<T*>(stage.values) +
                                    Stage::at(row, i % Stage::kPieces)) = make_uint4(0, 0, 0, 0);
        }
      }
      tile::fence_async_proxy();
      __syncwarp();
    }
    attention_.template add<Stage>(stage.keys, stage.values, tokens);
  }

  __device__ __forceinline__ void multiply_piece(const Stage& stage,
                                                 float (&x)[kItemTiles][4]) const {
    DirectTile<T, kDim> rows[kItemTiles];
#pragma unroll
    for (int t = 0; t < kItemTiles; ++t) {
      const T* const from = stage.window(kTileRows * t + lane_ / 4) + 8 * (lane_ % 4);
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) {
        rows[t].words[i] = *reinterpret_cast<const uint4*>(from + 32 * i);
      }
    }
    multiply(rows, score_q_, x);
  }

  __device__ __forceinline__ void add_piece(const Stage& stage, unsigned exist) {
    float x[kItemTiles][4];
    multiply_piece(stage, x);
#pragma unroll
    for (int t = 0; t < kItemTiles; ++t) {
      const unsigned bits = exist >> (kTileRows * t + 2 * (lane_ % 4));
      normalise(x[t], (bits & 1) != 0, (bits & 2) != 0);
    }
  }

  __device__ __forceinline__ void score_item(const Stage& stage, unsigned exist, int item) const {
    float x[kItemTiles][4];
    multiply_piece(stage, x);
    const float s = score(x);
    publish_keys(s, (exist >> score_window() & 1) != 0, item);
  }

  // Every part makes the whole choice, and the ring holds what there is to read meanwhile.
  __device__ __forceinline__ void choose() {
    TopCandidates<kStepThreads>(keys(), a_.init_blocks, candidates_end_, shared_.select)
        .choose(forced_.free, shared_.list, [](int, int) {});
  }

  // The warps' results become this part's, and everybody is told.
  __device__ __forceinline__ void merge_warps(const Results& to) {
    __syncthreads();  // nobody needs a ring any more
    shared_.merge.put(attention_, warp_);
    __syncthreads();
    std::uint32_t* const set = to.set(part_);
    shared_.merge.merge(
        [&](int head, int d, float4 o) {
          if (head < group_) publish(set + head * kDim + d, o);
        },
        [&](int head, float top, float sum) {
          if (head < group_) publish(Results::total(set, head), make_float2(top, sum));
        });
    if (part_ == 0 && sequence_.sparse) write_selection(shared_.list);  // while results come
  }

  // Each part puts its share of the outputs together, four neighbours a thread.
  __device__ __forceinline__ void merge_parts(const Results& from) const {
    constexpr int kHeadPieces = kDim / 4;
    constexpr int kTogether = 4;
    const int end = share(group_ * kHeadPieces, part_ + 1, parts_);
#pragma unroll 1
    for (int first = share(group_ * kHeadPieces, part_, parts_) + 32 * warp_; first < end;
         first += kStepThreads) {
      const int piece = first + lane_;
      const int head = piece / kHeadPieces;
      float4 o = {};
      float top = -kInfinity;
      float sum = 0;
#pragma unroll 1
      for (int p = 0; p < parts_; p += kTogether) {
        uint4 words[kTogether];
        uint2 totals[kTogether];
        bool there;
        do {
          there = true;
#pragma unroll
          for (int i = 0; i < kTogether; ++i) {
            if (p + i < parts_ && piece < end) {
              std::uint32_t* const set = from.set(p + i);
              look(set + 4 * piece, words[i]);
              look(Results::total(set, head), totals[i]);
              there &= is_there(words[i]) && is_there(totals[i]);
            }
          }
        } while (__any_sync(kAllLanes, !there));
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const float other = __uint_as_float(totals[i].x);
          if (p + i >= parts_ || other == -kInfinity) continue;
          const float larger = fmaxf(top, other);
          const float old_weight = tile::fast_exp2(top - larger);
          const float weight = tile::fast_exp2(other - larger);
          top = larger;
          sum = sum * old_weight + __uint_as_float(totals[i].y) * weight;
          o.x = o.x * old_weight + __uint_as_float(words[i].x) * weight;
          o.y = o.y * old_weight + __uint_as_float(words[i].y) * weight;
          o.z = o.z * old_weight + __uint_as_float(words[i].z) * weight;
          o.w = o.w * old_weight + __uint_as_float(words[i].w) * weight;
        }
      }
      if (piece < end) store(head, 4 * (piece % kHeadPieces), o, top, sum);
    }
  }

  __device__ __forceinline__ void store(int head, int d, float4 o, float top, float sum) const {
    const float factor = sum > 0 ? 1 / sum : 0;
    *reinterpret_cast<uint2*>(output<T, kDim>(head, d)) = {
        tile::pack2<T>(o.x * factor, o.y * factor), tile::pack2<T>(o.z * factor, o.w * factor)};
    if (d == 0) store_lse(head, top, sum);
  }

  S& shared_;
  Stream stream_;
  HeadQueries<T, kDim> score_q_;
  WarpAttention<T, kDim> attention_;
};

}  // namespace infllm::cuda::decode
