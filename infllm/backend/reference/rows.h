// SPDX-License-Identifier: Apache-2.0
//
// The cells of this column, one source file per row of the grid.
#pragma once

#include "infllm/ops/kernels.h"

namespace infllm::reference {

using Workspace = std::span<std::byte>;

std::int64_t kv_page_bytes(const KvLayout& layout);
Status kv_append(const Backend&, const KvAppendParams&, Workspace);
Status kv_read(const Backend&, const KvReadParams&, Workspace);

Status compress(const Backend&, const CompressParams&, Workspace);
Status score(const Backend&, const ScoreParams&, Workspace);
std::size_t score_workspace_bytes(const Backend&, const ScoreParams&);
Status select(const Backend&, const SelectParams&, Workspace);
Status attend(const Backend&, const AttendParams&, Workspace);
std::size_t attend_workspace_bytes(const Backend&, const AttendParams&);
Status attend_backward(const Backend&, const AttendBackwardParams&, Workspace);
std::size_t attend_backward_workspace_bytes(const Backend&, const AttendBackwardParams&);
Status align(const Backend&, const AlignParams&, Workspace);
std::size_t align_workspace_bytes(const Backend&, const AlignParams&);
Status align_backward(const Backend&, const AlignBackwardParams&, Workspace);
std::size_t align_backward_workspace_bytes(const Backend&, const AlignBackwardParams&);

Result<LinearWeight> pack_linear(const Backend&, std::span<const TensorView> parts, WeightFormat,
                                 std::int32_t group_size);
Status linear(const Backend&, const LinearParams&, Workspace);
std::size_t linear_workspace_bytes(const Backend&, const LinearParams&);
Result<EmbeddingTable> upload_table(const Backend&, const TensorView&);
Status embed(const Backend&, const EmbedParams&, Workspace);
Status rms_norm(const Backend&, const RmsNormParams&, Workspace);
Status rope_tables(const Backend&, const RopeTableParams&, Workspace);
Status rope(const Backend&, const RopeParams&, Workspace);
Status swiglu(const Backend&, const SwigluParams&, Workspace);
Status gather(const Backend&, const GatherParams&, Workspace);

}  // namespace infllm::reference
