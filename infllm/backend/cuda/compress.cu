// SPDX-License-Identifier: Apache-2.0
//
// Mean-pooled keys. Windows overlap, but they are made of whole groups of 16 tokens: a block of
// threads sums each group of kTilePages pages and of the page behind them once, in shared memory,
// and puts the sums together: two for a fine window, eight for a coarse one. So keys are read
// little more than once, and a window is the same sum in the same order however its tokens arrived.
#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/numbers.cuh"
#include "infllm/backend/cuda/page.cuh"
#include "infllm/backend/cuda/rows.h"

namespace infllm::cuda {
namespace {

constexpr int kTilePages = 4;
constexpr int kPageGroups = kPageTokens / kFineStride;
constexpr int kTileGroups = (kTilePages + 1) * kPageGroups;
constexpr int kFineGroups = kFineTokens / kFineStride;
constexpr int kCoarseGroups = kCoarseTokens / kFineStride;
static_assert(kCoarseGroups <= 2 * kPageGroups && kFineGroups <= kPageGroups + 1,
              "a window reaches into the next page at most");

// Windows first .. end - 1 are new: their last token lies in [from, length).
struct Range {
  int first;
  int end;
};

__device__ Range new_windows(int from, int length, int tokens, int stride) {
  const int first = from < tokens ? 0 : (from - tokens) / stride + 1;
  const int end = length < tokens ? 0 : (length - tokens) / stride + 1;
  return {first, end};
}

// Lengths and page tables are looked at before the kernel in front has ended, so they must come
// from copies, as a plan's do, and not from that kernel.
//
// blockIdx: tile of pages (counted from the first page that changes), head, sequence.
// threadIdx: 16 bytes of a row, group.
template <typename T, int kDim>
__global__ void __launch_bounds__(kTileGroups* kDim / kVector)
    compress_kernel(PagePool pool, Batch batch, const std::int32_t* from_length) {
  constexpr int kUnits = kDim / kVector;
  __shared__ float sums[kTileGroups][kDim];
  start_next();
  const Sequence sequence(batch, blockIdx.z);
  const int head = blockIdx.y;
  const int from = from_length != nullptr ? from_length[blockIdx.z] : sequence.first_position();
  const Range fine = new_windows(from, sequence.length, kFineTokens, kFineStride);
  const Range coarse = new_windows(from, sequence.length, kCoarseTokens, kCoarseStride);
  const bool any_fine = fine.first < fine.end;
  const bool any_coarse = coarse.first < coarse.end;
  int first_page = any_fine ? fine.first / kFineRows : coarse.first / kCoarseRows;
  if (any_coarse) first_page = min(first_page, coarse.first / kCoarseRows);
  first_page += static_cast<int>(blockIdx.x) * kTilePages;
  if ((!any_fine && !any_coarse) || first_page >= sequence.blocks()) {
    wait_for_previous();  // the kernel behind takes our end for that of all in front
    return;
  }

  const int unit = static_cast<int>(threadIdx.x) % kUnits;
  const int group = static_cast<int>(threadIdx.x) / kUnits;  // within the tile
  const int first_token = first_page * kPageTokens + group * kFineStride;
  const int page_index = group / kPageGroups;
  const int page = sequence.page(first_page + page_index, pool.num_pages);
  const T* rows = nullptr;
  if (first_token + kFineStride <= sequence.length && page >= 0) {
    rows = pool.plane<const T>(page, pool.map.pooled_key(head)) +
           group % kPageGroups * kFineStride * kDim;
    if (unit == 0) prefetch(rows, kFineStride * kDim * static_cast<int>(sizeof(T)));
  }
  wait_for_previous();

  float sum[kVector] = {};
  if (rows != nullptr) {
#pragma unroll
    for (int row = 0; row < kFineStride; ++row) {
      float x[kVector];
      load(rows + row * kDim + unit * kVector, x);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[i] += x[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) sums[group][unit * kVector + i] = sum[i];
  __syncthreads();

  // The windows that begin with this thread's group, if it has a page of this tile.
  if (page_index >= kTilePages || page < 0) return;
  const auto write = [&](int groups, T* row) {
    float mean[kVector] = {};
    for (int g = 0; g < groups; ++g) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) mean[i] += sums[group + g][unit * kVector + i];
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) mean[i] /= static_cast<float>(groups * kFineStride);
    store(row + unit * kVector, mean);
  };
  const int window = first_page * kFineRows + group;
  if (window >= fine.first && window < fine.end) {
    write(kFineGroups, pool.plane<T>(page, pool.map.fine(head)) + group % kFineRows * kDim);
  }
  const int coarse_window = first_page + page_index;
  if (group % kPageGroups == 0 && coarse_window >= coarse.first && coarse_window < coarse.end) {
    write(kCoarseGroups, pool.plane<T>(page, pool.map.coarse(head)));
  }
}

}  // namespace

Status compress(const Backend& backend, const CompressParams& p, Workspace) {
  const Device& device = device_of(backend);
  if (p.batch.num_sequences == 0 || p.batch.max_kv_length < kFineTokens) return {};
  const PagePool pool(p.pages);
  // New tokens end windows that began up to a coarse window before them.
  const std::int64_t changed =
      p.from_length != nullptr ? p.batch.max_kv_length : p.batch.max_query_length + kCoarseTokens;
  const std::int64_t pages = ceil_div(changed, kPageTokens) + 1;
  const dim3 grid(static_cast<unsigned>(ceil_div(pages, kTilePages)),
                  static_cast<unsigned>(p.pages.layout.kv_heads),
                  static_cast<unsigned>(p.batch.num_sequences));
  return with_type(p.pages.layout.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int dim = p.pages.layout.head_dim;
    const auto kernel = dim == 64 ? compress_kernel<T, 64> : compress_kernel<T, 128>;
    const int threads = kTileGroups * dim / kVector;
    return launch(device, "compress", kernel, grid, threads, 0, pool, p.batch, p.from_length);
  });
}

}  // namespace infllm::cuda
