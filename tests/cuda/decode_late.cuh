// SPDX-License-Identifier: Apache-2.0
//
// A kernel in front that writes what a step's tokens bring, keys, values and the windows that end
// with them, so late that whoever reads those rows before its end reads NaN.
#pragma once

#include "infllm/backend/cuda/launch.cuh"
#include "tests/cuda/decode_case.cuh"

namespace infllm::decode_check {

inline constexpr int kNewestRows = 4;  // of a sequence and head

// Row i of them, or null.
template <typename T>
__device__ T* newest_row(const cuda::PagePool& pool, const cuda::Sequence& sequence, int head,
                         int dim, int i) {
  const int last = sequence.length - 1;
  const int fine = cuda::fine_windows(sequence.length) - 1;
  const int coarse = cuda::coarse_windows(sequence.length) - 1;
  const int block = i < 2    ? last / cuda::kPageTokens
                    : i == 2 ? (fine < 0 ? -1 : fine / cuda::kFineRows)
                             : coarse;
  const int page = sequence.page(block, pool.num_pages);
  if (page < 0) return nullptr;
  const std::int64_t plane = i == 0   ? pool.map.key(head)
                             : i == 1 ? pool.map.value(head)
                             : i == 2 ? pool.map.fine(head)
                                      : pool.map.coarse(head);
  const int row = i < 2 ? last % cuda::kPageTokens : i == 2 ? fine % cuda::kFineRows : 0;
  return pool.plane<T>(page, plane) + row * dim;
}

// hide: the rows go into the stash [sequences][heads][kNewestRows][dim], and become NaN; otherwise
// they come back, after a while. Block: sequence.
template <typename T>
__global__ void move_newest(cuda::PagePool pool, Batch batch, T* stash, int dim, bool hide) {
  cuda::start_next();
  cuda::wait_for_previous();
  if (!hide) {
    for (int i = 0; i < 30; ++i) __nanosleep(1000);
  }
  const int index = static_cast<int>(blockIdx.x);
  const cuda::Sequence sequence(batch, index);
  if (sequence.tokens == 0) return;
  for (int n = 0; n < kNewestRows * pool.map.heads; ++n) {
    T* const row = newest_row<T>(pool, sequence, n / kNewestRows, dim, n % kNewestRows);
    if (row == nullptr) continue;
    T* const kept = stash + (std::int64_t{index} * kNewestRows * pool.map.heads + n) * dim;
    for (int i = static_cast<int>(threadIdx.x); i < dim; i += static_cast<int>(blockDim.x)) {
      (hide ? kept : row)[i] = (hide ? row : kept)[i];
      if (hide) row[i] = cuda::to<T>(__builtin_nanf(""));
    }
  }
}

class Newest {
 public:
  explicit Newest(const Case& c)
      : case_(c),
        stash_(c.shape.lengths.size() * kNewestRows * c.shape.heads_kv * c.shape.head_dim) {}

  void hide(const cuda::Device& device) { move(device, true); }
  void show_late(const cuda::Device& device) { move(device, false); }

 private:
  void move(const cuda::Device& device, bool hide) {
    cuda::with_type(case_.shape.dtype, [&](auto type) {
      using T = decltype(type);
      must(cuda::launch(device, "move_newest", move_newest<T>,
                        static_cast<unsigned>(case_.shape.lengths.size()), 128, 0,
                        cuda::PagePool(case_.pools[0]), case_.batch,
                        reinterpret_cast<T*>(stash_.get()), case_.shape.head_dim, hide));
      return 0;
    });
  }

  const Case& case_;
  Array<std::uint16_t> stash_;
};

}  // namespace infllm::decode_check
