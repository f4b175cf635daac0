// SPDX-License-Identifier: Apache-2.0
//
// The rows that are the same on every architecture, each in the file of its name.
#pragma once

#include "infllm/ops/kernels.h"

namespace infllm::cuda {

using Workspace = std::span<std::byte>;

// layout.cc: pages of 64 tokens, windows of 32 every 16, head dimensions 64 and 128, the column's
// activation type. kv_cache.cu: the rows.
Status check_layout(const KvLayout& layout, DType activation);
std::int64_t kv_page_bytes(const KvLayout& layout);
Status kv_append(const Backend& backend, const KvAppendParams& params, Workspace);
Status kv_read(const Backend& backend, const KvReadParams& params, Workspace);

// compress.cu
Status compress(const Backend& backend, const CompressParams& params, Workspace);

// transformer.cu
Status embed(const Backend& backend, const EmbedParams& params, Workspace);
Status rms_norm(const Backend& backend, const RmsNormParams& params, Workspace);
Status rope(const Backend& backend, const RopeParams& params, Workspace);
Status swiglu(const Backend& backend, const SwigluParams& params, Workspace);
Status gather(const Backend& backend, const GatherParams& params, Workspace);

// rope_tables.cu
Status rope_tables(const Backend& backend, const RopeTableParams& params, Workspace);

// rope_append.cu
Status rope_append(const Backend& backend, const RopeAppendParams& params, Workspace);
bool rope_append_pools(const Backend& backend, const RopeAppendParams& params);

// sampling.cu
Status top_logits(const Backend& backend, const TopLogitsParams& params, Workspace workspace);
std::size_t top_logits_bytes(const Backend& backend, const TopLogitsParams& params);

// linear.cc
Result<LinearWeight> pack_linear(const Backend& backend, std::span<const TensorView> parts,
                                 WeightFormat format, std::int32_t group_size);
Status linear(const Backend& backend, const LinearParams& params, Workspace workspace);
std::size_t linear_workspace_bytes(const Backend& backend, const LinearParams& params);
Result<EmbeddingTable> upload_table(const Backend& backend, const TensorView& table);

}  // namespace infllm::cuda
