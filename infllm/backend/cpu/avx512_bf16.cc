// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define INFLLM_CPU_ISA avx512_bf16
#define INFLLM_CPU_EXTRA_ISA ",avx512bf16,avx512vbmi"
#define INFLLM_CPU_NATIVE_BF16
#include <hwy/detect_targets.h>
#undef HWY_TARGET
#define HWY_TARGET HWY_AVX3
#include "infllm/backend/cpu/column-inl.h"
#endif
