// SPDX-License-Identifier: Apache-2.0
#define INFLLM_CPU_ISA portable
#include <hwy/detect_targets.h>
#undef HWY_TARGET
#define HWY_TARGET HWY_EMU128
#include "infllm/backend/cpu/column-inl.h"
