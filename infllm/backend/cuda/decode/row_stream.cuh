// SPDX-License-Identifier: Apache-2.0
//
// What one thread block of the streaming step does: one part of one row, from queries to outputs.
// Its warps read one stream each (warp_stream.cuh), which never stops while there is anything known
// to be read: what parts tell each other (exchange.cuh) and the choice of blocks happen beside it.
#pragma once

#include <climits>

#include "infllm/backend/cuda/decode/direct_tile.cuh"
#include "infllm/backend/cuda/decode/merge.cuh"
#include "infllm/backend/cuda/decode/normaliser.cuh"
#include "infllm/backend/cuda/decode/part_results.cuh"
#include "infllm/backend/cuda/decode/top_blocks.cuh"
#include "infllm/backend/cuda/decode/warp_stream.cuh"
#include "infllm/backend/cuda/numbers.cuh"

namespace infllm::cuda::decode {

inline constexpr int kStreamWarps = 8;
inline constexpr int kStreamThreads = 32 * kStreamWarps;
inline constexpr int kMaxStreamParts = kStreamThreads / kRowHeads;
inline constexpr int kMaxStreamColumns = kStreamThreads;

struct StreamArgs {
  CUtensorMap planes;  // {64, 64 tokens, panels, keys and values of all heads, pages}
  PagePool pool;
  Batch batch;
  const void* q_score;
  const void* q;
  void* o;
  float* lse;
  std::int32_t* selection;
  int columns;
  int heads_q;
  int parts;          // of a row
  float score_scale;  // to logits in powers of 2
  float scale;
  int init_blocks;
  int local_blocks;
  bool fine_normaliser;
  bool settled;  // SelectAttendParams
  // What parts tell each other, kept as in PartArgs (row_part.cuh).
  std::uint32_t* normalisers;  // [rows][16][parts]
  std::uint32_t* results;      // of PartResults, [rows][parts]
  std::uint32_t* keys;         // [rows][key_stride], packed
  int key_stride;
  std::uint32_t* arrivals;  // of thread blocks, less one
};

// What is known of a sequence, and its page table as far as one load a thread goes, into L1, all at
// once. The loads have no conditions; their results go where nobody looks, as loads whose results
// nobody takes are not made.
class WarmSequence {
 public:
  __device__ __forceinline__ WarmSequence(const Batch& batch, int sequence) {
    constexpr int kSector = 8;
    const int thread = static_cast<int>(threadIdx.x);
    load(batch.page_table + std::int64_t{sequence} * batch.max_pages +
             min(kSector * thread, batch.max_pages - 1),
         words_[0]);
    const void* from = batch.kv_length + sequence;
    if (thread == 0) from = batch.query_start + sequence;
    if (thread == 1) from = batch.query_start + sequence + 1;
    if (thread == 2 && batch.any_sparse) from = batch.sparse + sequence;
    load(from, words_[1]);
  }

  // anywhere: a word for each thread.
  __device__ __forceinline__ void wait(std::int32_t* anywhere) const {
    anywhere[threadIdx.x] = static_cast<std::int32_t>(words_[0] ^ words_[1]);
  }

 private:
  __device__ __forceinline__ static void load(const void* from, std::uint32_t& word) {
    asm volatile("ld.global.ca.u8 %0, [%1];" : "=r"(word) : "l"(from));
  }

  std::uint32_t words_[2];
};

// Which thread block this is, in the order in which they start; by all threads. A row's parts have
// numbers that follow each other. So, whatever else is on the device, all parts of all rows but one
// have started, and run to their end; nobody needs the whole launch to be resident.
__device__ __forceinline__ int take_number(std::uint32_t* arrivals, int count, int& number) {
  if (threadIdx.x == 0) {
    number = static_cast<int>(atomicAdd(arrivals, 1u) + 1);   // from kNothing on
    if (number == count - 1) atomicExch(arrivals, kNothing);  // before anybody starts the next one
  }
  __syncthreads();
  return number;
}

template <typename T, int kDim>
struct StreamShared {
  using Stream = WarpStream<T, kDim>;
  union {
    Piece<T, kDim> stages[kStreamWarps][Stream::kStages];
    WarpResults<kDim, kStreamWarps> merge;  // when the rings are done with
  };
  T q[kRowHeads * kDim];
  typename Stream::Shared streams[kStreamWarps];
  TopBlocksShared<kStreamThreads> select;
  float2 of_warps[kStreamWarps][kRowHeads];  // normalisers
  float lse[kRowHeads];
  std::int32_t list[kMaxStreamColumns];  // the blocks chosen freely
  int number;                            // of the thread block
  alignas(16) std::uint16_t keys[8];     // [key_stride]
};

// One part of one row.
template <typename T, int kDim>
class RowStream {
 public:
  using S = StreamShared<T, kDim>;
  using Stream = typename S::Stream;
  using Stage = typename Stream::Stage;
  using Results = PartResults<kDim, kStreamThreads>;

  // Part `part` of row `row`, counted through the heads of all sequences.
  __device__ __forceinline__ RowStream(const StreamArgs& args, const Sequence& sequence, int row,
                                       int part, S& shared)
      : a_(args),
        sequence_(sequence),
        shared_(shared),
        warp_(static_cast<int>(threadIdx.x / 32)),
        lane_(static_cast<int>(threadIdx.x % 32)),
        part_(part),
        parts_(args.parts),
        head_kv_(row % args.pool.map.heads),
        group_(args.heads_q / args.pool.map.heads),
        row_(row),
        own_((sequence.length - 1) / kPageTokens),
        candidates_end_(max(0, own_ + 1 - args.local_blocks)),
        forced_(own_, args.init_blocks, args.local_blocks,
                sequence.sparse ? args.columns : INT_MAX),
        stream_(args.pool, sequence, forced_, head_kv_,
                WarpPlace{kStreamWarps * part_ + warp_, kStreamWarps * parts_}, normaliser(),
                fine(), candidates_end_, &args.planes, shared.list, shared.stages[warp_],
                shared.streams[warp_]) {}

  // What needs only the batch's arrays.
  __device__ __forceinline__ void prepare() {
    warm();
    shared_.select.clear();
    stream_.prepare(a_.settled);
  }

  __device__ __forceinline__ void run() {
    const bool chooses = forced_.free > 0;
    const std::uint32_t count = Results::look_at_count(words(), parts_);
    load_queries();
    const Results results(words(), part_, parts_, count);
    results.clear();  // while the first keys come
    const int choose_at =
        chooses ? max(stream_.fine_end, stream_.forced_end - Stream::kStages) : -1;
#pragma unroll 1
    for (int n = 0;; ++n) {
      if (n == stream_.normaliser_end && chooses) exchange_normalisers();
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
        score(stage, static_cast<unsigned>(exist), stream_.fine_piece(n));
      } else {
        normalise(stage, static_cast<unsigned>(exist));
      }
      __syncwarp();  // the stage is used up
      stream_.fill(n + 1);
    }
    merge_warps(results);
    merge_parts(results);
    if (warp_ > 0) return;
    if (lane_ == 0) results.count();
    if (chooses) clear_cells();
  }

 private:
  // The queries and the counts of results into L2.
  __device__ __forceinline__ void warm() const {
    const T* const q = queries(warp_ == 0 ? a_.q : a_.q_score);
    if (warp_ < 2 && lane_ == 0) prefetch(q, group_ * kDim * static_cast<int>(sizeof(T)));
    if (warp_ == 2 && lane_ < parts_) prefetch(words() + lane_ * kPartWords + 2 * kSetWords, 32);
  }

  __device__ __forceinline__ const T* queries(const void* all) const {
    return static_cast<const T*>(all) +
           (std::int64_t{sequence_.first_token} * a_.heads_q + head_kv_ * group_) * kDim;
  }
  __device__ __forceinline__ std::uint32_t* words() const {
    return a_.results + std::int64_t{row_} * parts_ * kPartWords;
  }
  __device__ __forceinline__ PooledRows fine() const {
    return {a_.pool.map.fine(head_kv_), kFineShift, fine_windows(sequence_.length)};
  }
  __device__ __forceinline__ PooledRows normaliser() const {
    if (a_.fine_normaliser) return fine();
    return {a_.pool.map.coarse(head_kv_), kCoarseShift, coarse_windows(sequence_.length)};
  }
  __device__ __forceinline__ std::uint32_t* normaliser_cell(int head, int part) const {
    return a_.normalisers + (row_ * kRowHeads + head) * parts_ + part;
  }
  __device__ __forceinline__ std::uint32_t* keys() const {
    return a_.keys + std::int64_t{row_} * a_.key_stride;
  }
  __device__ __forceinline__ int fine_pieces() const {
    return (candidates_end_ + kPieceBlocks - 1) / kPieceBlocks;
  }

  // Queries to score with into registers, those to attend with into shared memory, and the first
  // pieces on their way.
  __device__ __forceinline__ void load_queries() {
    constexpr int kPieces = kRowHeads * Stage::kPieces;
    static_assert(kPieces <= kStreamThreads);
    const int row = static_cast<int>(threadIdx.x) / Stage::kPieces;
    const int piece = static_cast<int>(threadIdx.x) % Stage::kPieces;
    uint4 attend = make_uint4(0, 0, 0, 0);
    if (row < group_) {
      attend = __ldcg(
          reinterpret_cast<const uint4*>(queries(a_.q) + row * kDim + piece * kPieceElements));
    }
    if (forced_.free > 0) score_q_.load(queries(a_.q_score), group_);
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

  // Logits of heads lane / 4 + 8 r and windows 8 t + 2 (lane % 4) + j: x[t][2 r + j].
  __device__ __forceinline__ void multiply(const Stage& stage, float (&x)[4][4]) const {
    DirectTile<T, kDim> rows[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const T* const from = stage.window(8 * t + lane_ / 4) + 8 * (lane_ % 4);
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) {
        rows[t].words[i] = *reinterpret_cast<const uint4*>(from + 32 * i);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) x[t][j] = 0;
    }
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
#pragma unroll
      for (int t = 0; t < 4; ++t) rows[t].add_products(score_q_, i, x[t]);
    }
  }

  __device__ __forceinline__ void normalise(const Stage& stage, unsigned exist) {
    float x[4][4];
    multiply(stage, x);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const unsigned bits = exist >> (8 * t + 2 * (lane_ % 4));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        normalisers_[r].add((bits & 1) != 0 ? x[t][2 * r] * a_.score_scale : -kInfinity,
                            (bits & 2) != 0 ? x[t][2 * r + 1] * a_.score_scale : -kInfinity);
      }
    }
  }

  // Every head's share of the denominator, from all warps of all parts: its logarithm. Heads that
  // do not exist, or that have nothing to be normalised by, get +inf and so no weight.
  __device__ __forceinline__ void exchange_normalisers() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      normalisers_[r].template merge_lanes<1, 4>();
      if (lane_ % 4 == 0) {
        shared_.of_warps[warp_][lane_ / 4 + 8 * r] = {normalisers_[r].top, normalisers_[r].sum};
      }
    }
    __syncthreads();
    constexpr int kLanes = kMaxStreamParts;
    const int head = static_cast<int>(threadIdx.x) / kLanes;
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    Normaliser all;
    if (lane < kStreamWarps) {
      const float2 one = shared_.of_warps[lane][head];
      all.top = one.x;
      all.sum = one.y;
    }
    all.template merge_lanes<1, kLanes>();
    if (lane == 0) publish(normaliser_cell(head, part_), word_of(all.lse()));
    std::uint32_t words[1];
    take(normaliser_cell(head, lane), 0, lane < parts_ ? 1 : 0, words);
    all.top = lane < parts_ ? __uint_as_float(words[0]) : -kInfinity;
    all.sum = all.top == -kInfinity ? 0 : 1;
    all.template merge_lanes<1, kLanes>();
    if (lane == 0) shared_.lse[head] = head < group_ && all.sum > 0 ? all.lse() : kInfinity;
    __syncthreads();
  }

  // Keys of the eight blocks of a piece of fine windows.
  __device__ __forceinline__ void score(const Stage& stage, unsigned exist, int piece) const {
    float x[4][4];
    multiply(stage, x);
    const float lse[2] = {shared_.lse[lane_ / 4], shared_.lse[lane_ / 4 + 8]};
    float s[8];  // of window 8 t + 2 (lane % 4) + j, two of its heads
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        s[2 * t + j] = tile::fast_exp2(x[t][j] * a_.score_scale - lse[0]) +
                       tile::fast_exp2(x[t][2 + j] * a_.score_scale - lse[1]);
      }
    }
    // Over the lanes that have the other heads; each keeps half of its windows, three times, and so
    // one in the end: t is lane / 8, j is lane / 4 % 2.
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
      const bool upper = (lane_ & 4 * half) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float given = upper ? s[i] : s[half + i];
        s[i] = (upper ? s[half + i] : s[i]) + __shfl_xor_sync(kAllLanes, given, 4 * half);
      }
    }
    const int window = lane_ / 8 * 8 + lane_ % 4 * 2 + lane_ / 4 % 2;
    const std::uint32_t last = (exist >> window & 1) != 0 ? sort_key(s[0], true) : 0;
    std::uint32_t best = max(last, __shfl_xor_sync(kAllLanes, last, 1));
    best = max(best, __shfl_xor_sync(kAllLanes, best, 4));
    if ((lane_ & 5) == 5) {  // has the last window of a block
      publish(keys() + kPieceBlocks * piece + lane_ / 8 * 2 + lane_ / 2 % 2,
              packed({.best = best, .last = last}));
    }
  }

  // Every part makes the whole choice.
  __device__ __forceinline__ void choose() {
    take_keys();
    __syncthreads();
    choose_blocks<kStreamThreads>(shared_.keys, a_.init_blocks, candidates_end_, forced_.free,
                                  kBf16KeyBits, shared_.select, shared_.list);
    __syncthreads();
  }

  // Everybody's keys into shared memory, each with the window of the block before that overlaps it.
  __device__ __forceinline__ void take_keys() {
    const int pieces = fine_pieces();
#pragma unroll 1
    for (int first = 32 * warp_; first < pieces; first += kStreamThreads) {
      const int piece = first + lane_;
      const std::uint32_t* const from = keys() + kPieceBlocks * piece;
      const int count = piece < pieces ? 2 : 0;
      uint4 words[2];
      std::uint32_t before = 0;
      do {
        look_at(from, 4, count, words);
        if (piece > 0 && count > 0) look(from - 1, before);
      } while (__any_sync(kAllLanes, !are_there(count, words) || !is_there(before)));
      if (count == 0) continue;
      std::uint32_t key[kPieceBlocks];
#pragma unroll
      for (int i = 0; i < kPieceBlocks; ++i) {
        const std::uint32_t one = word(words[i / 4], i % 4);
        key[i] = max(one >> 16, before & 0xffff);
        before = one;
      }
      *reinterpret_cast<uint4*>(shared_.keys + kPieceBlocks * piece) =
          make_uint4(key[0] | key[1] << 16, key[2] | key[3] << 16, key[4] | key[5] << 16,
                     key[6] | key[7] << 16);
    }
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
          if (head < group_) publish(total(set, head), make_float2(top, sum));
        });
    if (part_ == 0 && sequence_.sparse) write_selection();  // while the others' results come
  }
  __device__ __forceinline__ static std::uint32_t* total(std::uint32_t* set, int head) {
    return set + 8 * kMaxOctets + 2 * head;
  }

  // Each part puts its share of the outputs together, four neighbours a thread.
  __device__ __forceinline__ void merge_parts(const Results& from) const {
    constexpr int kHeadPieces = kDim / 4;
    constexpr int kTogether = 4;
    const int end = share(group_ * kHeadPieces, part_ + 1, parts_);
#pragma unroll 1
    for (int first = share(group_ * kHeadPieces, part_, parts_) + 32 * warp_; first < end;
         first += kStreamThreads) {
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
              look(total(set, head), totals[i]);
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
    const int query_head = head_kv_ * group_ + head;
    const float factor = sum > 0 ? 1 / sum : 0;
    T* const to = static_cast<T*>(a_.o) +
                  (std::int64_t{sequence_.first_token} * a_.heads_q + query_head) * kDim + d;
    *reinterpret_cast<uint2*>(to) = {tile::pack2<T>(o.x * factor, o.y * factor),
                                     tile::pack2<T>(o.z * factor, o.w * factor)};
    if (d == 0 && a_.lse != nullptr) {
      a_.lse[std::int64_t{query_head} * a_.batch.num_tokens + sequence_.first_token] =
          sum > 0 ? (top + __log2f(sum)) * kLn2 : -kInfinity;
    }
  }

  // Ascending, -1 behind the last one.
  __device__ __forceinline__ void write_selection() const {
    std::int32_t* const out =
        a_.selection +
        (std::int64_t{head_kv_} * a_.batch.num_tokens + sequence_.first_token) * a_.columns;
    for (int i = static_cast<int>(threadIdx.x); i < a_.columns; i += kStreamThreads) {
      const int behind = i - forced_.sinks;
      int block = i;
      if (behind >= 0) {
        block = behind < forced_.free ? shared_.list[behind]
                                      : forced_.first_local + behind - forced_.free;
      }
      out[i] = block <= own_ ? block : -1;
    }
  }

  // Every part has sent its results to this warp, so none looks at normalisers and keys any more.
  __device__ __forceinline__ void clear_cells() const {
    if (lane_ < kRowHeads) publish(normaliser_cell(lane_, part_), kNothing);
    const int words = kPieceBlocks * fine_pieces();
#pragma unroll 1
    for (int i = 4 * (32 * part_ + lane_); i < words; i += 4 * 32 * parts_) {
      publish(keys() + i, make_uint4(kNothing, kNothing, kNothing, kNothing));
    }
  }

  const StreamArgs& a_;
  const Sequence& sequence_;
  S& shared_;
  const int warp_, lane_;
  const int part_, parts_;
  const int head_kv_, group_;
  const int row_;             // among all (sequence, KV head)
  const int own_;             // block of the token
  const int candidates_end_;  // blocks from here on are forced, or come after the token's own
  const Forced forced_;
  Stream stream_;
  Normaliser normalisers_[2];
  HeadQueries<T, kDim> score_q_;
  WarpAttention<T, kDim> attention_;
};

}  // namespace infllm::cuda::decode
