// bf16 as its 16 bits, which the host and the device round alike. Plain C++; nvcc adds the device.
#pragma once

#include <cstdint>
#include <cstring>

#include "inline.h"

namespace atat_fast {

using Half = uint16_t;  // bf16; this library has no fp16

ATAT_FAST_INLINE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

ATAT_FAST_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

ATAT_FAST_INLINE float from_bfloat16(Half half) { return float_from_bits(static_cast<uint32_t>(half) << 16); }

// The nearest bf16, ties to even. NaN becomes 0x7FFF, as in the device's instruction.
ATAT_FAST_INLINE Half to_bfloat16(float value) {
  const uint32_t bits = bits_of_float(value);
  return static_cast<Half>(value != value ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// Two neighbours in one word, the first in its low half.
ATAT_FAST_INLINE uint32_t to_bfloat16_pair(float first, float second) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return static_cast<uint32_t>(to_bfloat16(second)) << 16 | to_bfloat16(first);
#endif
}

// An element as it is computed with, and a result as it is stored: bf16 is computed in fp32, everything else in its own type.
ATAT_FAST_INLINE double widened(double value) { return value; }
ATAT_FAST_INLINE float widened(float value) { return value; }
ATAT_FAST_INLINE float widened(Half value) { return from_bfloat16(value); }
ATAT_FAST_INLINE void narrow(double& out, double value) { out = value; }
ATAT_FAST_INLINE void narrow(float& out, float value) { out = value; }
ATAT_FAST_INLINE void narrow(Half& out, float value) { out = to_bfloat16(value); }

}  // namespace atat_fast
