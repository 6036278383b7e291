// The random numbers of docs/philox.md: Philox4x32-10, on the host and on the device. Plain C++; nvcc adds the device.
#pragma once

#include <cmath>
#include <cstdint>

#include "inline.h"

namespace atat_fast {

struct PhiloxWords {
  uint32_t word[4];
};

ATAT_FAST_INLINE uint32_t product_high(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

ATAT_FAST_INLINE PhiloxWords philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = product_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = product_high(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The four words of element `index`; a token's is sample * length + position.
ATAT_FAST_INLINE PhiloxWords random_words(uint64_t index, uint64_t seed, uint32_t step, uint32_t stream) {
  return philox4x32(static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), step, stream, static_cast<uint32_t>(seed),
                    static_cast<uint32_t>(seed >> 32));
}

// Standard Gumbel noise -log(-log(u)) of u = (word + 0.5) / 2^32. Both tails keep their relative precision in fp32: below u = 1/2
// the logarithm is of u, and above it is log1p of u - 1, which is exact because it is formed from the integer.
ATAT_FAST_INLINE float gumbel(uint32_t word) {
  const bool low = word < 0x80000000u;
  const float small = (static_cast<float>(low ? word : ~word) + 0.5f) * 0x1p-32f;
  return -logf(low ? -logf(small) : -log1pf(-small));
}

// The same of u = (high * 2^32 + low + 0.5) / 2^64. Its values reach 45; those of 32 bits end at 22.9.
ATAT_FAST_INLINE float gumbel64(uint32_t high, uint32_t low) {
  const bool under = high < 0x80000000u;
  const float top = static_cast<float>(static_cast<int32_t>(under ? high : ~high));
  const float small = (top + (static_cast<float>(under ? low : ~low) + 0.5f) * 0x1p-32f) * 0x1p-32f;
  return -logf(under ? -logf(small) : -log1pf(-small));
}

}  // namespace atat_fast
