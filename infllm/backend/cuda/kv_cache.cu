// SPDX-License-Identifier: Apache-2.0
//
// Writing keys and values into pages, and reading them back: copies, 16 bytes a thread.
#include "infllm/backend/cuda/launch.cuh"
#include "infllm/backend/cuda/page.cuh"
#include "infllm/backend/cuda/rows.h"

namespace infllm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxSources = 3;

// The rows that a step brings and the planes that they go to.
struct Append {
  const uint4* source[kMaxSources];  // [T, Hkv, D]
  std::int64_t plane[kMaxSources];   // of head 0; the other heads' follow
  int sources;
  int units;  // of 16 bytes in a row of one head
};

// One thread writes 16 bytes of one token. The tokens of a sequence are followed by the free slots
// of its last page: if this step began that page they are cleared, so that keys and values behind
// a sequence's end are finite. Their weight is 0, and 0 * NaN would not be.
__global__ void append_kernel(Append append, PagePool pool, Batch batch) {
  start_next();
  wait_for_previous();
  const int row_units = append.sources * pool.map.heads * append.units;
  const std::int64_t work = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int index = static_cast<int>(work / row_units);
  const int unit = static_cast<int>(work % row_units);
  const Sequence sequence(batch, blockIdx.y);
  if (sequence.tokens == 0 || index >= sequence.tokens + kPageTokens) return;
  const int position = sequence.first_position() + index;
  const int block = position / kPageTokens;
  const bool is_token = index < sequence.tokens;
  if (!is_token) {
    const int last_block = (sequence.length - 1) / kPageTokens;
    if (block != last_block || block * kPageTokens < sequence.first_position()) return;
  }
  const int page = sequence.page(block, pool.num_pages);
  if (page < 0) return;

  const int source = unit / (pool.map.heads * append.units);
  const int head = unit / append.units % pool.map.heads;
  const int column = unit % append.units;
  uint4 value{};
  if (is_token) {
    const std::int64_t token = sequence.first_token + index;
    value = append.source[source][(token * pool.map.heads + head) * append.units + column];
  }
  const std::int64_t slot = position % kPageTokens;
  pool.plane<uint4>(page, append.plane[source] + head * pool.map.plane_bytes() +
                              slot * pool.map.row_bytes)[column] = value;
}

struct Read {
  uint4* to;           // [rows of all sequences, Hkv, D]
  std::int64_t plane;  // of head 0
  std::int64_t plane_stride;
  int page_rows;  // of one head in one page
  int units;
  int tokens;  // of the first row; each further one begins
  int stride;  // this many later
};

__device__ int rows_within(const Read& read, int length) {
  return length < read.tokens ? 0 : (length - read.tokens) / read.stride + 1;
}

__global__ void read_kernel(Read read, PagePool pool, Batch batch) {
  start_next();
  wait_for_previous();
  const int row_units = pool.map.heads * read.units;
  const std::int64_t work = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int row = static_cast<int>(work / row_units);
  const int unit = static_cast<int>(work % row_units);
  const Sequence sequence(batch, blockIdx.y);
  if (row >= rows_within(read, sequence.length)) return;
  const int page = sequence.page(row / read.page_rows, pool.num_pages);
  if (page < 0) return;
  std::int64_t before = 0;  // rows of the sequences before this one
  for (int i = 0; i < static_cast<int>(blockIdx.y); ++i) {
    before += rows_within(read, batch.kv_length[i]);
  }
  const int head = unit / read.units;
  const auto* plane = pool.plane<const uint4>(page, read.plane + head * read.plane_stride);
  read.to[(before + row) * row_units + unit] =
      plane[row % read.page_rows * read.units + unit % read.units];
}

unsigned blocks_for(std::int64_t work) {
  return static_cast<unsigned>((work + kThreads - 1) / kThreads);
}

}  // namespace

Status kv_append(const Backend& backend, const KvAppendParams& p, Workspace) {
  const Device& device = device_of(backend);
  const PagePool pool(p.pages);
  Append append{};
  append.units = pool.map.row_bytes / static_cast<int>(sizeof(uint4));
  const auto add = [&](const void* rows, std::int64_t plane) {
    append.source[append.sources] = static_cast<const uint4*>(rows);
    append.plane[append.sources++] = plane;
  };
  add(p.k, pool.map.key(0));
  add(p.v, pool.map.value(0));
  if (p.pages.layout.score_keys()) add(p.k_score, pool.map.pooled_key(0));
  const std::int64_t slots = std::int64_t{p.batch.max_query_length} + kPageTokens;
  const dim3 grid(blocks_for(slots * append.sources * pool.map.heads * append.units),
                  static_cast<unsigned>(p.batch.num_sequences));
  return launch(device, "kv_append", append_kernel, grid, kThreads, 0, append, pool, p.batch);
}

Status kv_read(const Backend& backend, const KvReadParams& p, Workspace) {
  const Device& device = device_of(backend);
  const PagePool pool(p.pages);
  const int units = pool.map.row_bytes / static_cast<int>(sizeof(uint4));
  if (p.batch.num_sequences == 0) return {};
  const auto read = [&](void* to, std::int64_t plane, int page_rows, int tokens,
                        int stride) -> Status {
    if (to == nullptr || p.batch.max_kv_length < tokens) return {};
    const Read what{static_cast<uint4*>(to),
                    plane,
                    std::int64_t{page_rows} * pool.map.row_bytes,
                    page_rows,
                    units,
                    tokens,
                    stride};
    const std::int64_t rows = (p.batch.max_kv_length - tokens) / stride + 1;
    const dim3 grid(blocks_for(rows * pool.map.heads * units),
                    static_cast<unsigned>(p.batch.num_sequences));
    return launch(device, "kv_read", read_kernel, grid, kThreads, 0, what, pool, p.batch);
  };
  INFLLM_TRY(read(p.k, pool.map.key(0), kPageTokens, 1, 1));
  INFLLM_TRY(read(p.v, pool.map.value(0), kPageTokens, 1, 1));
  INFLLM_TRY(read(p.fine, pool.map.fine(0), kFineRows, kFineTokens, kFineStride));
  return read(p.coarse, pool.map.coarse(0), kCoarseRows, kCoarseTokens, kCoarseStride);
}

}  // namespace infllm::cuda
