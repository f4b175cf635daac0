// SPDX-License-Identifier: Apache-2.0
//
// Who runs in this step: all decodes, and prompts up to a budget.
//
//   - A sequence with one token to compute (it decodes, or a prompt's last token is left) always
//     runs: a long prompt cannot stall somebody's stream.
//   - The others share `chunk_tokens` evenly, the oldest first and at least a block each, so that a
//     short prompt need not wait until a long one is through; what one does not use goes to the
//     oldest. The oldest prompt advances in every step, hence nobody waits forever.
//   - A chunk that does not finish its prompt ends at a block's border, because tokens of one block
//     share the keys that they attend to.
//
// Which tokens run together changes speed, never text.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace infllm::engine {

struct SchedulerOptions {
  std::int32_t chunk_tokens = 512;  // of prompts in one step
  std::int32_t block_size = 64;
};

// A running sequence, seen by the scheduler.
struct Pending {
  std::int32_t cached = 0;    // tokens with keys in the cache
  std::int32_t uncached = 0;  // tokens to compute; at least 1
};

// How many tokens of each sequence run in this step; `running` is in order of arrival.
std::vector<std::int32_t> schedule(std::span<const Pending> running,
                                   const SchedulerOptions& options);

}  // namespace infllm::engine
