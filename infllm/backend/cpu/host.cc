// SPDX-License-Identifier: Apache-2.0
#include "infllm/backend/cpu/host.h"

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
       return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl");
     },
     &avx512_bf16::kernels},
#elif defined(__aarch64__)
    {"neon", [] { return true; }, &neon::kernels},
#endif
  };
  return list;
}

}  // namespace infllm::cpu
