// SPDX-License-Identifier: Apache-2.0
//
// score_select (ops/score_select.h) for batches with one token per sequence. The keys of a row, a
// (sequence, KV head), are shared out among several thread blocks, its parts:
//
//   1  normaliser   each part: maximum and sum of the exponentials of its coarse windows, per head
//   2  scores       each part: P of its fine windows, summed over the heads; the best of each block
//   3  selection    one part: the best blocks, ascending
//
// On 9.0 the parts are a cluster and the phases follow each other in one launch; elsewhere a phase
// is a launch. Only device memory says how long the sequences are, so a captured graph follows
// them.
//
// Lengths and page tables are looked at before the kernel in front has ended, so they must come
// from copies, as a plan's do, and not from that kernel.
#pragma once

#include <cstddef>
#include <span>

#include "infllm/ops/score_select.h"

namespace infllm::cuda::decode {

// One token per sequence, groups of at most 32 heads, heads of 64 or 128, at most 1M tokens and a
// window more.
bool scores(const Backend& backend, const ScoreSelectParams& params);
// The same, as attend sees it: whether the score_select that it follows was one of these.
bool scores(const KvLayout& layout, std::int32_t heads_q, const Batch& batch,
            const SparseConfig& config);

std::size_t score_select_bytes(const Backend& backend, const ScoreSelectParams& params);

// For every device from 8.0 on.
Status score_select_in_phases(const Backend& backend, const ScoreSelectParams& params,
                              std::span<std::byte> workspace);
// For 9.0.
Status score_select_in_clusters(const Backend& backend, const ScoreSelectParams& params,
                                std::span<std::byte> workspace);

}  // namespace infllm::cuda::decode
