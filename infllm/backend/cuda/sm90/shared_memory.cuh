// SPDX-License-Identifier: Apache-2.0
//
// Shared memory as Hopper's copy engine fills it and wgmma reads it: tiles of 64 rows in panels of
// 64 elements, a row of a panel being 128 bytes, eight units of 16 that are permuted with the row
// (tile/wgmma.cuh).
#pragma once

#include "infllm/backend/cuda/tile/barrier.cuh"

namespace infllm::cuda::sm90 {

inline constexpr int kSharedLimit = 227 * 1024;  // bytes of a thread block
inline constexpr int kPanel = 64;                // elements of a row that lie together
inline constexpr int kPanelBytes = 64 * 128;     // of 64 rows

// Where unit `unit` (0 .. 7) of a panel's row lies within the panel.
__device__ __forceinline__ int swizzled(int row, int unit) {
  return row * 128 + (unit ^ row % 8) * 16;
}

// The permutation repeats every 1024 bytes, so a kernel's shared memory must be aligned to that.
// What a launch gives need not be: the kernel asks for so much more, and skips some of it.
inline constexpr int kAlignment = 1024;

// What a kernel asks for.
template <class Shared>
constexpr std::size_t shared_bytes() {
  constexpr std::size_t kBytes = sizeof(Shared) + kAlignment;
  static_assert(alignof(Shared) == kAlignment && kBytes <= kSharedLimit);
  return kBytes;
}

// What it skips.
__device__ __forceinline__ std::uint32_t bytes_to_skip(const std::byte* memory) {
  return (kAlignment - tile::shared_address(memory) % kAlignment) % kAlignment;
}

}  // namespace infllm::cuda::sm90
