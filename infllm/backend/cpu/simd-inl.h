// SPDX-License-Identifier: Apache-2.0
//
// One instruction set per translation unit. avx2.cc, avx512.cc and their like set INFLLM_CPU_ISA
// (the namespace) and HWY_TARGET (Highway's target) and include column-inl.h; every *-inl.h of a
// row puts its code between INFLLM_CPU_BEGIN and INFLLM_CPU_END and uses Highway's verbs through
// `hn`.
//
// Standard and project headers come before INFLLM_CPU_BEGIN: code between the markers is compiled
// for the instruction set, and an inline function of a shared header must not be.
#pragma once

#if !defined(INFLLM_CPU_ISA) || !defined(HWY_TARGET)
#error "include this through one of the per-instruction-set sources"
#endif

#include <hwy/highway.h>

// Extra instructions that Debian's Highway has no target for, e.g. ",avx512bf16".
#ifndef INFLLM_CPU_EXTRA_ISA
#define INFLLM_CPU_EXTRA_ISA ""
#endif

#ifdef HWY_TARGET_STR
#define INFLLM_CPU_PUSH HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR INFLLM_CPU_EXTRA_ISA)
#define INFLLM_CPU_POP HWY_POP_ATTRIBUTES
#else  // the compiler's baseline
#define INFLLM_CPU_PUSH
#define INFLLM_CPU_POP
#endif

#define INFLLM_CPU_BEGIN     \
  INFLLM_CPU_PUSH            \
  namespace infllm::cpu {    \
  namespace INFLLM_CPU_ISA { \
  namespace hn = hwy::HWY_NAMESPACE;
#define INFLLM_CPU_END \
  }                    \
  }                    \
  INFLLM_CPU_POP
