// SPDX-License-Identifier: Apache-2.0
#if defined(__aarch64__)
#define INFLLM_CPU_ISA neon
#include <hwy/detect_targets.h>
#undef HWY_TARGET
#define HWY_TARGET HWY_NEON
#include "infllm/backend/cpu/column-inl.h"
#endif
