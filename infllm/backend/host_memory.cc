// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/host_memory.h"

#include <fmt/format.h>

#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "infllm/core/arena.h"

namespace infllm {
namespace {

// From this size on memory begins on a huge page and asks for more of them: a decode step that
// streams weights then misses the TLB once in 2 MiB, not once in 4 KiB, and packing a model faults
// 512 times less often.
constexpr std::size_t kHugePage = std::size_t{2} << 20;

}  // namespace

Result<Buffer> host_allocate(const Backend&, std::size_t bytes) {
  const std::size_t alignment = bytes >= 2 * kHugePage ? kHugePage : kArenaAlignment;
  const std::size_t padded = align_up(bytes == 0 ? 1 : bytes, alignment);
  auto* data = static_cast<std::byte*>(std::aligned_alloc(alignment, padded));
  if (data == nullptr) {
    return resource_exhausted(fmt::format("the machine has no {:.1f} MiB of memory left",
                                          static_cast<double>(bytes) / (1 << 20)));
  }
#if defined(__linux__)
  if (alignment == kHugePage) madvise(data, padded, MADV_HUGEPAGE);  // a wish: may be refused
#endif
  return Buffer(std::shared_ptr<std::byte>(data, &std::free), bytes);
}

Status host_copy(const Backend&, void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return {};
}

}  // namespace infllm
