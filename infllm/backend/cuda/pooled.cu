// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cuda/device.h"
#include "infllm/backend/cuda/page.cuh"
#include "infllm/backend/cuda/pooled.h"

namespace infllm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPagesPerBlock = 2;

struct GatherArgs {
  PagePool pool;
  Batch batch;
  uint4* fine;
  uint4* coarse;
  std::int64_t fine_rows;
  std::int64_t coarse_rows;
  int row_pieces;     // 16-byte pieces of a row
  int budget_blocks;  // a sequence of that many blocks needs no score
};

constexpr int round_to_tile(int rows) {
  return (rows + kPooledTile - 1) / kPooledTile * kPooledTile;
}

// One piece of one window's row; windows behind the last one are zero.
__device__ void copy_piece(const GatherArgs& a, int page, std::int64_t plane_offset, int row,
                           int piece, bool exists, uint4* to) {
  const uint4* from = a.pool.plane<const uint4>(max(page, 0), plane_offset);
  *to = exists && page >= 0 ? from[row * a.row_pieces + piece] : uint4{};
}

// Block (x, y): kPagesPerBlock pages of sequence y, all heads.
__global__ void __launch_bounds__(kThreads) gather_kernel(GatherArgs a) {
  const int index = static_cast<int>(blockIdx.y);
  const Sequence sequence(a.batch, index);
  if (!sequence.sparse || sequence.blocks() <= a.budget_blocks) return;
  const int heads = a.pool.map.heads;
  const int fine_end = round_to_tile(fine_windows(sequence.length));
  const int coarse_end = a.coarse_rows == 0 ? 0 : round_to_tile(coarse_windows(sequence.length));
  const int head_pieces = (kFineRows + kCoarseRows) * a.row_pieces;
  const int page_pieces = heads * head_pieces;
  for (int i = static_cast<int>(threadIdx.x); i < kPagesPerBlock * page_pieces; i += kThreads) {
    const int block = static_cast<int>(blockIdx.x) * kPagesPerBlock + i / page_pieces;
    const int head = i % page_pieces / head_pieces;
    const int row = i % head_pieces / a.row_pieces;
    const int piece = i % a.row_pieces;
    const int page = sequence.page(block, a.pool.num_pages);
    const std::int64_t plane = std::int64_t{index} * heads + head;
    if (row < kFineRows) {
      const int window = block * kFineRows + row;
      if (window >= fine_end) continue;
      copy_piece(a, page, a.pool.map.fine(head), row, piece, window < fine_windows(sequence.length),
                 a.fine + (plane * a.fine_rows + window) * a.row_pieces + piece);
    } else {
      const int window = block * kCoarseRows + row - kFineRows;
      if (window >= coarse_end) continue;
      copy_piece(a, page, a.pool.map.coarse(head), row - kFineRows, piece,
                 window < coarse_windows(sequence.length),
                 a.coarse + (plane * a.coarse_rows + window) * a.row_pieces + piece);
    }
  }
}

}  // namespace

PooledSizes::PooledSizes(const ScoreParams& params)
    : planes(std::int64_t{params.batch.num_sequences} * params.pages.layout.kv_heads),
      fine_rows(round_to_tile(fine_windows(params.batch.max_kv_length))),
      coarse_rows(params.config.lse_source == LseSource::kFine
                      ? 0
                      : round_to_tile(coarse_windows(params.batch.max_kv_length))),
      row_bytes(params.pages.layout.head_dim * size_of(params.pages.layout.dtype)) {}

std::size_t PooledSizes::bytes() const {
  ArenaSize size;
  size.take<std::byte>(fine_bytes());
  size.take<std::byte>(coarse_bytes());
  return size.bytes();
}

PooledKeys carve(const PooledSizes& sizes, Arena& arena) {
  PooledKeys keys;
  keys.fine = arena.take<std::byte>(sizes.fine_bytes());
  keys.coarse = arena.take<std::byte>(sizes.coarse_bytes());
  return keys;
}

Status gather_pooled(const Backend& backend, const ScoreParams& params, const PooledKeys& to) {
  const Device& device = device_of(backend);
  const PooledSizes sizes(params);
  const std::int64_t pages = std::max(sizes.fine_rows / kFineRows, sizes.coarse_rows / kCoarseRows);
  if (pages == 0) return {};
  const GatherArgs args{.pool = PagePool(params.pages),
                        .batch = params.batch,
                        .fine = reinterpret_cast<uint4*>(to.fine),
                        .coarse = reinterpret_cast<uint4*>(to.coarse),
                        .fine_rows = sizes.fine_rows,
                        .coarse_rows = sizes.coarse_rows,
                        .row_pieces = static_cast<int>(sizes.row_bytes / sizeof(uint4)),
                        .budget_blocks = params.config.budget_blocks()};
  const dim3 grid(static_cast<unsigned>(ceil_div(pages, kPagesPerBlock)),
                  static_cast<unsigned>(params.batch.num_sequences));
  gather_kernel<<<grid, kThreads, 0, device.stream>>>(args);
  return launched("score");
}

}  // namespace infllm::cuda
