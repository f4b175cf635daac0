// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define INFLLM_CPU_ISA avx512
#include <hwy/detect_targets.h>
#undef HWY_TARGET
#define HWY_TARGET HWY_AVX3
#include "infllm/backend/cpu/column-inl.h"
#endif
