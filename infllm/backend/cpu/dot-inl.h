// SPDX-License-Identifier: Apache-2.0
//
// The verb that everything fast is made of: a lane holds two neighbouring bf16 values, the even one
// in the low half, and dot_pairs adds both products to a float lane.
//
//   acc[i] += a[2i] b[2i] + a[2i+1] b[2i+1]
//
// With AVX512-BF16 it is one instruction (which adds the two products in one go and flushes
// subnormals); elsewhere two shifts and two fused multiply-adds in float.
#pragma once

#include "infllm/backend/cpu/simd-inl.h"

#if defined(INFLLM_CPU_NATIVE_BF16)
#include <immintrin.h>
#endif

INFLLM_CPU_BEGIN

using F32 = hn::ScalableTag<float>;  // as wide as the machine
using U32 = hn::RebindToUnsigned<F32>;
using VF32 = hn::Vec<F32>;
using VU32 = hn::Vec<U32>;  // pairs of bf16

// The even (low) and odd (high) values of pairs, as floats.
HWY_INLINE VF32 even_of(VU32 pairs) { return hn::BitCast(F32(), hn::ShiftLeft<16>(pairs)); }
HWY_INLINE VF32 odd_of(VU32 pairs) {
  return hn::BitCast(F32(), hn::And(pairs, hn::Set(U32(), 0xffff0000u)));
}

HWY_INLINE VF32 dot_pairs(VU32 a, VU32 b, VF32 acc) {
#if defined(INFLLM_CPU_NATIVE_BF16)
  return VF32{_mm512_dpbf16_ps(acc.raw, (__m512bh)a.raw, (__m512bh)b.raw)};
#else
  return hn::MulAdd(odd_of(a), odd_of(b), hn::MulAdd(even_of(a), even_of(b), acc));
#endif
}

INFLLM_CPU_END
