// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "infllm/backend/cuda/decode/attend.h"
#include "infllm/backend/cuda/decode/row_stream.cuh"
#include "infllm/backend/cuda/decode/row_stream.h"
#include "infllm/backend/cuda/decode/score_select.h"
#include "infllm/backend/cuda/decode/select_attend.h"
#include "infllm/backend/cuda/tile/tensor_map.h"

namespace infllm::cuda::decode {
namespace {

template <typename T, int kDim>
__global__ void __launch_bounds__(kStreamThreads, 1)
    row_stream_kernel([[maybe_unused]] const __grid_constant__ StreamArgs a) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<StreamShared<T, kDim>*>(memory);
  // The row that it will nearly always be.
  const WarmSequence warm(a.batch, static_cast<int>(blockIdx.x) / a.parts / a.pool.map.heads);
  const int number = take_number(a.arrivals, static_cast<int>(gridDim.x), shared.number);
  warm.wait(shared.list);
  const int row = number / a.parts;
  Sequence sequence(a.batch, row / a.pool.map.heads);
  sequence.length = min(sequence.length, a.batch.max_kv_length);
  RowStream<T, kDim> stream(a, sequence, row, number % a.parts, shared);
  if (sequence.tokens != 0) stream.prepare();  // beside the end of the kernel before
  wait_for_previous();
  start_next();
  if (sequence.tokens != 0) stream.run();
#endif
}

// How the device is shared out among the rows.
struct Sizes {
  Sizes(const Device& device, const SelectAttendParams& p)
      : rows(std::int64_t{p.attend.batch.num_sequences} * p.attend.pages.layout.kv_heads),
        key_stride(
            static_cast<int>(ceil_div(p.choose.select.blocks(), kPieceBlocks) * kPieceBlocks)) {
    const KvLayout& layout = p.attend.pages.layout;
    // Everybody merges something, and waits for everybody when it does.
    const std::int64_t pieces = p.attend.heads_q / layout.kv_heads * layout.head_dim / 4;
    parts = static_cast<int>(std::min<std::int64_t>(
        {device.sm_count / std::max<std::int64_t>(rows, 1), pieces, kMaxStreamParts}));
    shared_bytes = (layout.head_dim == 128 ? sizeof(StreamShared<__half, 128>)
                                           : sizeof(StreamShared<__half, 64>)) +
                   sizeof(std::uint16_t) * key_stride;
    free_words = static_cast<std::int64_t>(exchange_words(device.sm_count)) -
                 std::int64_t{kRowHeads + kPartWords} * device.sm_count - 8;
  }

  std::int64_t rows;
  int key_stride;
  int parts;
  std::size_t shared_bytes;
  std::int64_t free_words;  // to be exchanged, for keys
};

template <typename T, int kDim>
Status launch_rows(const Device& device, const Sizes& sizes, const StreamArgs& args) {
  const auto kernel = row_stream_kernel<T, kDim>;
  INFLLM_TRY(to_status("row_stream",
                       cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(sizes.shared_bytes))));
  return launch_parts(device, "row_stream", kernel,
                      dim3(static_cast<unsigned>(sizes.parts * sizes.rows)), kStreamThreads,
                      sizes.shared_bytes, 1, args);
}

// Slices of 16 tokens of the keys and values of all heads.
Result<CUtensorMap> plane_map(const KvPages& pages) {
  const PagePool pool(pages);
  const auto row_bytes = static_cast<std::uint64_t>(pool.map.row_bytes);
  const auto panels = static_cast<std::uint32_t>(pages.layout.head_dim / 64);
  return tile::make_tensor_map(
      {.data = pool.data,
       .dtype = pages.layout.dtype,
       .rank = 5,
       .size = {64, kPageTokens, panels, 2 * static_cast<std::uint64_t>(pool.map.heads),
                static_cast<std::uint64_t>(pool.num_pages)},
       .stride_bytes = {row_bytes, 128, kPageTokens * row_bytes,
                        static_cast<std::uint64_t>(pool.page_bytes)},
       .box = {64, kSliceTokens, panels, 1, 1}});
}

}  // namespace

bool streams_rows(const Backend& backend, const SelectAttendParams& p) {
  const Device& device = device_of(backend);
  const Sizes sizes(device, p);
  const KvLayout& layout = p.attend.pages.layout;
  return device.exchange != nullptr && attends(backend, p.attend) && scores(backend, p.choose) &&
         sizes.parts > 0 && sizes.shared_bytes <= device.shared_bytes &&
         sizes.rows * sizes.key_stride <= sizes.free_words &&
         p.attend.heads_q / layout.kv_heads <= kRowHeads && p.attend.columns <= kMaxStreamColumns &&
         p.choose.score.config.score_rounding == ScoreRounding::kBF16;
}

Status stream_rows(const Backend& backend, const SelectAttendParams& p, std::span<std::byte>) {
  const Device& device = device_of(backend);
  const Sizes sizes(device, p);
  const SparseConfig& config = p.choose.score.config;
  std::uint32_t* const results = device.exchange + kRowHeads * device.sm_count;
  const StreamArgs args{.planes = INFLLM_TRY(plane_map(p.attend.pages)),
                        .pool = PagePool(p.attend.pages),
                        .batch = p.attend.batch,
                        .q_score = p.choose.score.q,
                        .q = p.attend.q,
                        .o = p.attend.o,
                        .lse = static_cast<float*>(p.attend.lse),
                        .selection = p.choose.select.selection,
                        .columns = p.choose.select.columns(),
                        .heads_q = p.attend.heads_q,
                        .parts = sizes.parts,
                        .score_scale = p.choose.score.scale * kLog2E,
                        .scale = p.attend.scale * kLog2E,
                        .init_blocks = config.init_blocks,
                        .local_blocks = config.local_blocks(),
                        .fine_normaliser = config.lse_source == LseSource::kFine,
                        .settled = p.settled,
                        .normalisers = device.exchange,
                        .results = results,
                        .keys = results + std::int64_t{kPartWords} * device.sm_count,
                        .key_stride = sizes.key_stride,
                        .arrivals = device.exchange + exchange_words(device.sm_count) - 1};
  return with_type(p.attend.pages.layout.dtype, [&](auto type) {
    using T = decltype(type);
    return p.attend.pages.layout.head_dim == 128 ? launch_rows<T, 128>(device, sizes, args)
                                                 : launch_rows<T, 64>(device, sizes, args);
  });
}

}  // namespace infllm::cuda::decode
