// SPDX-License-Identifier: Apache-2.0
//
// Where somebody is in a ring of slots in shared memory, of which each has two mbarriers:
//
//   RingCursor<kSlots> at;
//   producer: mbarrier_wait(&empty[at.slot], at.phase ^ 1); fill; arrive at full; at.advance();
//   consumer: mbarrier_wait(&full[at.slot], at.phase); use; mbarrier_arrive(&empty[at.slot]);
//             at.advance();
//
// The producer's first round finds every slot empty: the phase before a fresh barrier's first one
// counts as complete.
#pragma once

#include <cstdint>

namespace infllm::cuda::tile {

template <int kSlots>
struct RingCursor {
  int slot = 0;
  std::uint32_t phase = 0;  // parity that the slot's "full" barrier completes with

  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      phase ^= 1;
    }
  }
};

}  // namespace infllm::cuda::tile
