// SPDX-License-Identifier: Apache-2.0
//
// The results of a row's parts on their way into one, through words of global memory
// (exchange.cuh). Every part sends all its outputs and puts a share of them together, so every word
// has one reader, who clears it when it is read.
#pragma once

#include "infllm/backend/cuda/decode/exchange.cuh"
#include "infllm/backend/cuda/decode/merge.cuh"

namespace infllm::cuda::decode {

inline constexpr int kMaxResultParts = 32;
inline constexpr int kMaxPartOutputs = kRowHeads * 128;
inline constexpr int kMaxPartTotals = 4 * kMaxResultParts;  // two heads for each reader
inline constexpr int kPartWords = kMaxPartOutputs + kMaxPartTotals;

// Four outputs of a head, not normalised, with the soft-max's maximum and sum.
struct SoftMaxResult {
  __device__ __forceinline__ void add(float other_top, float other_sum, float4 other) {
    const float largest = fmaxf(top, other_top);
    const float base = largest == -kInfinity ? 0 : largest;
    const float mine = tile::fast_exp2(top - base);
    const float its = tile::fast_exp2(other_top - base);
    top = largest;
    sum = mine * sum + its * other_sum;
    o.x = mine * o.x + its * other.x;
    o.y = mine * o.y + its * other.y;
    o.z = mine * o.z + its * other.z;
    o.w = mine * o.w + its * other.w;
  }
  __device__ __forceinline__ void add_lane(int step) {
    add(__shfl_xor_sync(kAllLanes, top, step), __shfl_xor_sync(kAllLanes, sum, step),
        make_float4(__shfl_xor_sync(kAllLanes, o.x, step), __shfl_xor_sync(kAllLanes, o.y, step),
                    __shfl_xor_sync(kAllLanes, o.z, step), __shfl_xor_sync(kAllLanes, o.w, step)));
  }

  float top = -kInfinity;
  float sum = 0;
  float4 o = {};
};

// Units are four outputs; a part puts together a run of neighbouring ones.
template <int kDim, int kThreads>
class PartResults {
 public:
  static constexpr int kWords = kPartWords;
  struct Shared {
    float4 o[kThreads];
    float2 total[kThreads];
  };

  // words: of all parts of the row; group: its heads.
  __device__ __forceinline__ PartResults(std::uint32_t* words, int part, int parts, int group)
      : words_(words),
        part_(part),
        parts_(parts),
        group_(group),
        units_(group * kHeadUnits),
        most_((units_ + parts - 1) / parts),
        heads_((most_ + kHeadUnits - 2) / kHeadUnits + 1) {}

  __device__ __forceinline__ void publish_outputs(int head, int d, float4 o) const {
    if (head < group_) publish(words_ + part_ * kWords + head * kDim + d, o);
  }
  // To everybody who needs it, a copy of his own.
  __device__ __forceinline__ void publish_total(int head, float top, float sum) const {
    if (head >= group_) return;
    const int last = reader_of((head + 1) * kHeadUnits - 1);
    for (int reader = reader_of(head * kHeadUnits); reader <= last; ++reader) {
      publish(total(part_, reader, head), make_float2(top, sum));
    }
  }

  // By all threads: store(head, column, result) for this part's units.
  template <typename Store>
  __device__ __forceinline__ void gather(Shared& shared, const Store& store) const {
    // Neighbouring threads have neighbouring units of one part's results; `lanes` of them all.
    int lanes = 1;
    while (lanes < most_) lanes *= 2;
    const int groups = kThreads / lanes;
    const int thread = static_cast<int>(threadIdx.x);
    const int group = thread / lanes;
    const int first = share(units_, part_, parts_);
    const int end = share(units_, part_ + 1, parts_);
    const int unit = first + thread % lanes;
    const int head = unit / kHeadUnits;
    constexpr int kMost = 4;  // of a thread: parts <= 4 groups
    const int count = unit < end ? (parts_ - group + groups - 1) / groups : 0;
    std::uint32_t* outputs = words_ + group * kWords + 4 * unit;
    std::uint32_t* totals = total(group, part_, head);
    const int stride = groups * kWords;
    uint2 found_totals[kMost];
    uint4 found[kMost];
    do {
      look_at(totals, stride, count, found_totals);
      look_at(outputs, stride, count, found);
    } while (!are_there(count, found_totals) || !are_there(count, found));
    SoftMaxResult all;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i >= count) continue;
      all.add(__uint_as_float(found_totals[i].x), __uint_as_float(found_totals[i].y),
              make_float4(__uint_as_float(found[i].x), __uint_as_float(found[i].y),
                          __uint_as_float(found[i].z), __uint_as_float(found[i].w)));
    }
#pragma unroll 1
    for (int step = lanes; step < 32; step *= 2) all.add_lane(step);
    shared.o[thread] = all.o;
    shared.total[thread] = make_float2(all.top, all.sum);
    __syncthreads();  // and all threads that share a total have read it
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i >= count) continue;
      publish(outputs + i * stride, make_uint4(kNothing, kNothing, kNothing, kNothing));
      publish(totals + i * stride, make_uint2(kNothing, kNothing));
    }
    if (thread >= end - first) return;
    all = {};
#pragma unroll 1
    for (int i = thread; i < kThreads; i += max(lanes, 32)) {
      all.add(shared.total[i].x, shared.total[i].y, shared.o[i]);
    }
    store(head, unit % kHeadUnits * 4, all);
  }

 private:
  static constexpr int kHeadUnits = kDim / 4;

  // The part that puts a unit together.
  __device__ __forceinline__ int reader_of(int unit) const {
    return ((unit + 1) * parts_ + units_ - 1) / units_ - 1;
  }
  // Where a part tells `reader` about a head.
  __device__ __forceinline__ std::uint32_t* total(int part, int reader, int head) const {
    const int first = share(units_, reader, parts_) / kHeadUnits;
    return words_ + part * kWords + kMaxPartOutputs + 2 * (reader * heads_ + head - first);
  }

  std::uint32_t* const words_;
  const int part_, parts_, group_;
  const int units_;
  const int most_;   // units of a part
  const int heads_;  // that these can belong to
};

}  // namespace infllm::cuda::decode
