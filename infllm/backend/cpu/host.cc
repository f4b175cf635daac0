// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cpu/host.h"

#include <fmt/format.h>

#include <cstdlib>
#include <cstring>

#include "infllm/core/arena.h"

namespace infllm::cpu {

// Each is defined by the source of its name.
namespace portable {
const Kernels& kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
namespace avx512_bf16 {
const Kernels& kernels();
}
#elif defined(__aarch64__)
namespace neon {
const Kernels& kernels();
}
#endif

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

std::span<const Column> columns() {
  static const Column list[] = {
    {"portable", [] { return true; }, &portable::kernels},
#if defined(__x86_64__)
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     &avx2::kernels},
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     },
     &avx512::kernels},
    {"avx512_bf16",
     [] {
       return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     },
     &avx512_bf16::kernels},
#elif defined(__aarch64__)
    {"neon", [] { return true; }, &neon::kernels},
#endif
  };
  return list;
}

}  // namespace infllm::cpu
