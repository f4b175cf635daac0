// SPDX-License-Identifier: Apache-2.0
//
// 2^x for soft-max. With n = round(x) and f = x - n in [-1/2, 1/2], 2^x = 2^n p(f), where p is the
// degree 6 minimax polynomial of relative error 2.6e-9 with p(0) = 1. Measured over every 197th
// float of [-126, 126]: at most 1.0 ulp.
//
//   x <= -127, also -inf      exactly 0, so a masked key weighs nothing
//   -127 < x < -126           a subnormal within 2^-126 of the truth
//   x > 127                   2^127, finite (kMayExceedOne: in score the coarse maximum is not an
//                             upper bound of the fine logits)
//
// Adding 1.5 * 2^23 rounds x to an integer and leaves it in the low bits of the sum, whose shift
// into the exponent field is then one integer add: no conversion instructions.
#pragma once

#include "infllm/backend/cpu/dot-inl.h"

INFLLM_CPU_BEGIN

template <bool kMayExceedOne = false>
HWY_INLINE VF32 exp2(VF32 x) {
  const F32 d;
  const U32 du;
  const VF32 magic = hn::Set(d, 12582912.0f);
  x = hn::Max(x, hn::Set(d, -127.0f));
  if constexpr (kMayExceedOne) x = hn::Min(x, hn::Set(d, 127.0f));
  const VF32 shifted = hn::Add(x, magic);
  const VF32 f = hn::Sub(x, hn::Sub(shifted, magic));
  VF32 p = hn::MulAdd(hn::Set(d, 0x1.470b4ap-13f), f, hn::Set(d, 0x1.5f7276p-10f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.3b270ep-7f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.c6ae72p-5f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.ebfbe2p-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.62e432p-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  const VU32 exponent = hn::ShiftLeft<23>(hn::BitCast(du, shifted));
  return hn::BitCast(d, hn::Add(hn::BitCast(du, p), exponent));
}

INFLLM_CPU_END
