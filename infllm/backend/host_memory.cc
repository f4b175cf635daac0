// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/host_memory.h"

#include <fmt/format.h>

#include <cstdlib>
#include <cstring>

#include "infllm/core/arena.h"

namespace infllm {

Result<Buffer> host_allocate(const Backend&, std::size_t bytes) {
  const std::size_t padded = align_up(bytes == 0 ? 1 : bytes);
  auto* data = static_cast<std::byte*>(std::aligned_alloc(kArenaAlignment, padded));
  if (data == nullptr) {
    return resource_exhausted(fmt::format("the machine has no {:.1f} MiB of memory left",
                                          static_cast<double>(bytes) / (1 << 20)));
  }
  return Buffer(std::shared_ptr<std::byte>(data, &std::free), bytes);
}

Status host_copy(const Backend&, void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return {};
}

}  // namespace infllm
