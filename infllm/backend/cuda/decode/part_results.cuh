// SPDX-License-Identifier: Apache-2.0
//
// The results of a row's parts on their way into one, through words of global memory
// (exchange.cuh). Every part sends all its outputs, and each of a row's warps puts some octets of
// them together: eight neighbouring outputs of a head, a lane for each part.
//
// A part has two sets of words, used in turn, so that it can clear one while it has time, and not
// when everybody has read it, at the end of the launch. Which one it uses is told by a count of its
// launches, which the others read.
#pragma once

#include "infllm/backend/cuda/decode/direct_tile.cuh"
#include "infllm/backend/cuda/decode/exchange.cuh"

namespace infllm::cuda::decode {

inline constexpr int kMaxResultParts = 32;
inline constexpr int kMaxOctets = kRowHeads * 128 / 8;
// Of each octet its outputs, and the soft-max's maximum and sum.
inline constexpr int kSetWords = kMaxOctets * (8 + 2);
inline constexpr int kPartWords = 2 * kSetWords + 8;  // and the count

template <int kDim, int kThreads>
class PartResults {
 public:
  static constexpr int kHeadOctets = kDim / 8;

  // The count of the part that is this lane's.
  __device__ __forceinline__ static std::uint32_t look_at_count(const std::uint32_t* words,
                                                                int parts) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    std::uint32_t count = 0;
    if (lane < parts) look(words + lane * kPartWords + 2 * kSetWords, count);
    return count;
  }

  // words: of all parts of the row; count: what look_at_count() found. By all warps, with a barrier
  // before any of them publishes.
  __device__ __forceinline__ PartResults(std::uint32_t* words, int part, int parts,
                                         std::uint32_t count)
      : words_(words),
        part_(part),
        parts_(parts),
        odd_(__ballot_sync(kAllLanes, (count & 1) != 0)),
        count_(count) {}

  // By all threads: this part's other set.
  __device__ __forceinline__ void clear() const {
    std::uint32_t* const other = words_ + part_ * kPartWords + (1 - turn(part_)) * kSetWords;
#pragma unroll
    for (int i = 0; i < kSetWords / 4; i += kThreads) {
      const int piece = i + static_cast<int>(threadIdx.x);
      if (piece < kSetWords / 4) {
        publish(other + 4 * piece, make_uint4(kNothing, kNothing, kNothing, kNothing));
      }
    }
  }
  // By a warp, when all parts have sent something.
  __device__ __forceinline__ void count() const {
    const int part = static_cast<int>(threadIdx.x % 32);
    if (part == part_) publish(words_ + part * kPartWords + 2 * kSetWords, count_ + 1);
  }

  // Outputs 2 pair and 2 pair + 1 of an octet, not normalised.
  __device__ __forceinline__ void publish_outputs(int octet, int pair, float2 o) const {
    publish(set(part_) + 8 * octet + 2 * pair, o);
  }
  __device__ __forceinline__ void publish_total(int octet, float top, float sum) const {
    publish(total(set(part_), octet), make_float2(top, sum));
  }

  // By a warp: waits for all parts' share of an octet; store(i, output, top, sum) is called by the
  // lane that then has output i of it, not normalised, of everybody.
  template <typename Store>
  __device__ __forceinline__ void gather(int octet, const Store& store) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const std::uint32_t* const from = set(lane);
    uint4 words[2] = {};
    uint2 totals[1] = {make_uint2(__float_as_uint(-kInfinity), 0)};
    const bool here = lane < parts_;
    do {
      look_at(from + 8 * octet, 4, here ? 2 : 0, words);
      look_at(total(from, octet), 0, here ? 1 : 0, totals);
    } while (__any_sync(kAllLanes, !are_there(2, words) || !are_there(1, totals)));
    const float own = __uint_as_float(totals[0].x);
    float top = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
    }
    const float weight = own == -kInfinity ? 0 : tile::fast_exp2(own - top);
    float sum = __uint_as_float(totals[0].y) * weight;
    float o[8] = {__uint_as_float(words[0].x), __uint_as_float(words[0].y),
                  __uint_as_float(words[0].z), __uint_as_float(words[0].w),
                  __uint_as_float(words[1].x), __uint_as_float(words[1].y),
                  __uint_as_float(words[1].z), __uint_as_float(words[1].w)};
#pragma unroll
    for (int i = 0; i < 8; ++i) o[i] *= weight;
      // Each lane keeps half of its outputs, and gives the other half away, three times.
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
      const bool upper = (lane & 4 * half) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float given = upper ? o[i] : o[half + i];
        o[i] = (upper ? o[half + i] : o[i]) + __shfl_xor_sync(kAllLanes, given, 4 * half);
      }
    }
    float all = o[0];
    all += __shfl_xor_sync(kAllLanes, all, 1);
    all += __shfl_xor_sync(kAllLanes, all, 2);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (lane % 4 == 0) store(lane / 4, all, top, sum);
  }

  // Where in a set the maximum and the sum are, of octet or head i.
  template <typename Words>
  __device__ __forceinline__ static Words* total(Words* set, int i) {
    return set + 8 * kMaxOctets + 2 * i;
  }

  // The words that a part uses in this launch.
  __device__ __forceinline__ std::uint32_t* set(int part) const {
    return words_ + part * kPartWords + turn(part) * kSetWords;
  }

 private:
  __device__ __forceinline__ int turn(int part) const { return static_cast<int>(odd_ >> part & 1); }

  std::uint32_t* const words_;  // [parts][kPartWords]
  const int part_, parts_;
  const unsigned odd_;         // parts that use their second set
  const std::uint32_t count_;  // of the part that is this lane's
};

}  // namespace infllm::cuda::decode
