// bf16 as its 16 bits, for the host and for the device, which round alike. Plain C++; nvcc adds the device.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

namespace atat_fast {

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

ATAT_FAST_INLINE float from_bfloat16(uint16_t half) { return float_from_bits(static_cast<uint32_t>(half) << 16); }

// The nearest bf16, ties to even; what is not a number becomes 0x7FFF, as the device's instruction has it.
ATAT_FAST_INLINE uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of_float(value);
  return static_cast<uint16_t>(value != value ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
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

}  // namespace atat_fast
