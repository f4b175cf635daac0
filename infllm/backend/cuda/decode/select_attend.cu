// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "infllm/backend/cuda/decode/attend.h"
#include "infllm/backend/cuda/decode/row_part.cuh"
#include "infllm/backend/cuda/decode/score_select.h"
#include "infllm/backend/cuda/decode/select_attend.h"
#include "infllm/backend/cuda/numbers.cuh"

namespace infllm::cuda::decode {
namespace {

constexpr int kMinParts = 16;  // of a row: with fewer, clusters are as fast or faster
// Leaves multiprocessors to the kernel behind, which prepares itself meanwhile.
constexpr int kMaxParts = kMaxResultParts;
constexpr int kMaxKeys = 1 << 19;

// Grid: parts, KV heads, sequences.
template <typename T, int kDim>
__global__ void __launch_bounds__(kPartThreads, 1)
    select_attend_kernel(const __grid_constant__ PartArgs a) {
  extern __shared__ __align__(128) std::byte memory[];
  Sequence sequence(a.batch, static_cast<int>(blockIdx.z));
  sequence.length = min(sequence.length, a.batch.max_kv_length);
  Part<T, kDim> part(a, sequence, *reinterpret_cast<PartShared<T, kDim>*>(memory));
  if (sequence.tokens != 0) {
    part.prepare();
    part.run();
  } else {
    wait_for_previous();
  }
}

// How the device is shared out among the rows.
struct Sizes {
  Sizes(const Device& device, const SelectAttendParams& p)
      : rows(std::int64_t{p.attend.batch.num_sequences} * p.attend.pages.layout.kv_heads),
        key_stride(
            static_cast<int>(ceil_div(p.choose.select.blocks(), kItemBlocks) * kItemBlocks)) {
    const KvLayout& layout = p.attend.pages.layout;
    // Everybody merges something, and waits for everybody when it does.
    const std::int64_t octets = p.attend.heads_q / layout.kv_heads * layout.head_dim / 8;
    parts = static_cast<int>(std::min<std::int64_t>(
        {device.sm_count / std::max<std::int64_t>(rows, 1), octets, kMaxParts}));
  }

  std::int64_t keys() const { return rows * key_stride; }

  std::int64_t rows;
  int key_stride;
  int parts;
};

template <typename T, int kDim>
Status launch_rows(const Device& device, const Sizes& sizes, const PartArgs& args) {
  const auto kernel = select_attend_kernel<T, kDim>;
  constexpr int kBytes = sizeof(PartShared<T, kDim>);
  INFLLM_TRY(
      to_status("select_attend",
                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes)));
  const dim3 grid(static_cast<unsigned>(sizes.parts), static_cast<unsigned>(args.pool.map.heads),
                  static_cast<unsigned>(args.batch.num_sequences));
  return launch_parts(device, "select_attend", kernel, grid, kPartThreads, kBytes, 1, args,
                      /*all_at_once=*/true);
}

}  // namespace

std::size_t exchange_words(int sm_count) {
  return std::size_t{kRowHeads + kPartWords} * sm_count + kMaxKeys;
}

bool select_attends(const Backend& backend, const SelectAttendParams& p) {
  const Sizes sizes(device_of(backend), p);
  const KvLayout& layout = p.attend.pages.layout;
  return device_of(backend).exchange != nullptr && attends(backend, p.attend) &&
         scores(backend, p.choose) && sizes.parts >= kMinParts &&
         p.attend.heads_q / layout.kv_heads <= kRowHeads && p.attend.columns <= kMaxColumns &&
         sizes.keys() <= kMaxKeys && p.choose.score.config.score_rounding == ScoreRounding::kBF16;
}

Status select_attend(const Backend& backend, const SelectAttendParams& p, std::span<std::byte>) {
  const Device& device = device_of(backend);
  const Sizes sizes(device, p);
  const SparseConfig& config = p.choose.score.config;
  std::uint32_t* const results = device.exchange + kRowHeads * device.sm_count;
  const PartArgs args{.pool = PagePool(p.attend.pages),
                      .batch = p.attend.batch,
                      .q_score = p.choose.score.q,
                      .q = p.attend.q,
                      .o = p.attend.o,
                      .lse = static_cast<float*>(p.attend.lse),
                      .selection = p.choose.select.selection,
                      .columns = p.choose.select.columns(),
                      .heads_q = p.attend.heads_q,
                      .score_scale = p.choose.score.scale * kLog2E,
                      .scale = p.attend.scale * kLog2E,
                      .init_blocks = config.init_blocks,
                      .local_blocks = config.local_blocks(),
                      .fine_normaliser = config.lse_source == LseSource::kFine,
                      .settled = p.settled,
                      .normalisers = device.exchange,
                      .results = results,
                      .keys = results + kPartWords * device.sm_count,
                      .key_stride = sizes.key_stride};
  return with_type(p.attend.pages.layout.dtype, [&](auto type) {
    using T = decltype(type);
    return p.attend.pages.layout.head_dim == 128 ? launch_rows<T, 128>(device, sizes, args)
                                                 : launch_rows<T, 64>(device, sizes, args);
  });
}

}  // namespace infllm::cuda::decode
