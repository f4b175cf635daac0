// SPDX-License-Identifier: Apache-2.0
//
// The grid's rows as one struct: a backend is a filled table. A cell is a function and the
// workspace it needs; a cell that is null is refused by its operation with a message. Cells get
// parameters that the operation has checked. They neither allocate nor synchronise.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <string_view>

#include "infllm/ops/align.h"
#include "infllm/ops/attend.h"
#include "infllm/ops/backend.h"
#include "infllm/ops/compress.h"
#include "infllm/ops/kv_cache.h"
#include "infllm/ops/rope_append.h"
#include "infllm/ops/sampling.h"
#include "infllm/ops/score.h"
#include "infllm/ops/score_select.h"
#include "infllm/ops/select.h"
#include "infllm/ops/select_attend.h"
#include "infllm/ops/transformer.h"

namespace infllm {

template <typename Params>
struct Cell {
  Status (*run)(const Backend&, const Params&, std::span<std::byte> workspace) = nullptr;
  // Null: none. May be an upper bound.
  std::size_t (*workspace_bytes)(const Backend&, const Params&) = nullptr;
  // Null: every shape that check_layout lets through. Of steps that others can stand in for.
  bool (*covers)(const Backend&, const Params&) = nullptr;
};

struct Kernels {
  std::string_view name;
  DType activation = DType::kF32;  // of hidden states, q, k, v and o
  DType accumulate = DType::kF32;  // of scores, LSE, logits and norm weights

  // Memory.
  Result<Buffer> (*allocate)(const Backend&, std::size_t bytes) = nullptr;
  Result<Buffer> (*allocate_visible)(const Backend&, std::size_t bytes) = nullptr;  // null on hosts
  Status (*copy_in)(const Backend&, void* device, const void* host, std::size_t) = nullptr;
  Status (*copy_out)(const Backend&, void* host, const void* device, std::size_t) = nullptr;

  Result<DeviceInfo> (*device_info)(const Backend&) = nullptr;  // null on hosts

  // Of columns whose cells return before their work is done; null on hosts.
  Status (*synchronize)(const Backend&) = nullptr;
  Result<Graph> (*record)(const Backend&, const std::function<Status()>& body) = nullptr;
  Status (*replay)(const Backend&, const Graph&) = nullptr;

  // Cache.
  Status (*check_layout)(const KvLayout&) = nullptr;  // what this column can hold; OK: all of it
  std::int64_t (*kv_page_bytes)(const KvLayout&) = nullptr;
  Cell<KvAppendParams> kv_append;
  Cell<KvReadParams> kv_read;

  // InfLLM-V2.
  Cell<CompressParams> compress;
  Cell<ScoreParams> score;
  Cell<SelectParams> select;
  Cell<ScoreSelectParams> score_select;  // null: score, then select
  Cell<AttendParams> attend;
  Cell<SelectAttendParams> select_attend;  // null: one after the other
  Cell<AttendBackwardParams> attend_backward;
  Cell<AlignParams> align;
  Cell<AlignBackwardParams> align_backward;

  // Plumbing.
  Result<LinearWeight> (*pack_linear)(const Backend&, std::span<const TensorView> parts,
                                      WeightFormat, std::int32_t group_size) = nullptr;
  Cell<LinearParams> linear;  // covers: linear_fuses()
  Result<EmbeddingTable> (*upload_table)(const Backend&, const TensorView&) = nullptr;
  Cell<EmbedParams> embed;
  Cell<RmsNormParams> rms_norm;
  Cell<RopeTableParams> rope_tables;
  Cell<RopeParams> rope;
  // Null: rope, gather and kv_append. What it covers it can pool, too.
  Cell<RopeAppendParams> rope_append;
  Cell<SwigluParams> swiglu;
  Cell<GatherParams> gather;
  Cell<TopLogitsParams> top_logits;  // null where the logits are in host memory anyhow
};

}  // namespace infllm
