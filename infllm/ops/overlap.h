// SPDX-License-Identifier: Apache-2.0
//
// How much neighbouring tokens' selections have in common, which is what a sparse kernel that
// shares blocks among neighbours lives from.
//
//   overlap = sum over tokens and heads |free[t - 1] intersected with free[t]| / sum |free[t]|
//
// free[t] are the blocks that token t selected by score: neither the first blocks, which everybody
// has, nor those of its local window, which neighbours share anyhow. Text gives about 0.75, tokens
// that have nothing to do with each other next to nothing.
#pragma once

#include <cstdint>
#include <span>

#include "infllm/ops/sparse_config.h"

namespace infllm {

// Of a selection [Hkv, tokens, columns] (ops/select.h) of one sequence whose tokens end at position
// length - 1. Where nobody chooses freely, 1.
double neighbours_overlap(const SparseConfig& config, std::span<const std::int32_t> selection,
                          std::int32_t heads_kv, std::int64_t tokens, std::int64_t columns,
                          std::int64_t length);

}  // namespace infllm
