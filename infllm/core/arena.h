// SPDX-License-Identifier: Apache-2.0
//
// A bump allocator over memory that somebody else owns: how a step carves its scratch arrays out of
// the workspace it was handed. Nothing is freed; the arena is a cursor.
//
//   Arena arena(workspace);
//   float* scores = arena.take<float>(tokens * blocks);
//
// ArenaSize runs the same sequence of take() calls without memory, to state workspace_bytes().
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "infllm/core/status.h"

namespace infllm {

inline constexpr std::size_t kArenaAlignment = 64;  // a cache line, an AVX-512 register

constexpr std::size_t align_up(std::size_t bytes, std::size_t alignment = kArenaAlignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

class Arena {
 public:
  explicit Arena(std::span<std::byte> memory) : memory_(memory) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    used_ = align_up(address) - address;
  }

  // `count` uninitialised elements, aligned to 64 bytes. Running out is our own mistake: every step
  // states what it needs.
  template <typename T>
  T* take(std::int64_t count) {
    const std::size_t bytes = align_up(static_cast<std::size_t>(count) * sizeof(T));
    INFLLM_CHECK(used_ + bytes <= memory_.size() || bytes == 0, "workspace too small");
    auto* pointer = reinterpret_cast<T*>(memory_.data() + used_);
    used_ += bytes;
    return pointer;
  }

  // What is left, for a callee.
  std::span<std::byte> rest() const {
    return used_ < memory_.size() ? memory_.subspan(used_) : std::span<std::byte>();
  }

 private:
  std::span<std::byte> memory_;
  std::size_t used_ = 0;
};

class ArenaSize {
 public:
  template <typename T>
  void take(std::int64_t count) {
    bytes_ += align_up(static_cast<std::size_t>(count) * sizeof(T));
  }
  void add(std::size_t bytes) { bytes_ += align_up(bytes); }
  // Includes the slack that aligning the first array may cost.
  std::size_t bytes() const { return bytes_ == 0 ? 0 : bytes_ + kArenaAlignment; }

 private:
  std::size_t bytes_ = 0;
};

}  // namespace infllm
