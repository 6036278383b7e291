// Sums over short rows on the CPU. A sum grows in lanes, because without -ffast-math a compiler may not reorder it, and its lanes
// are folded by vectors: `omp simd reduction` adds them up one by one, which costs more than a short row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bfloat16.h"

namespace atat_fast {

template <typename W>
ATAT_FAST_INLINE W fold(W (&lane)[8]) {
#pragma omp simd
  for (int j = 0; j < 4; ++j) lane[j] += lane[j + 4];
  return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}

template <typename W>
ATAT_FAST_INLINE W fold(W (&lane)[16]) {
#pragma omp simd
  for (int j = 0; j < 4; ++j) lane[j] = (lane[j] + lane[j + 4]) + (lane[j + 8] + lane[j + 12]);
  return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}

// The sum of term(i) for i below n.
template <typename Term>
ATAT_FAST_INLINE float sum(int64_t n, const Term& term) {
  constexpr int kLanes = 16;
  alignas(64) float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      const float a = term(i + j), b = term(i + kLanes + j), c = term(i + 2 * kLanes + j), d = term(i + 3 * kLanes + j);
      lane[j] += (a + b) + (c + d);
    }
  }
  for (; i < n; i += kLanes) {
    const int64_t left = std::min<int64_t>(kLanes, n - i);
#pragma omp simd
    for (int64_t j = 0; j < left; ++j) lane[j] += term(i + j);
  }
  return fold(lane);
}

struct Pair {
  float first, second;
};

// Two such sums, of term(i).first and of term(i).second.
template <typename Term>
ATAT_FAST_INLINE Pair sum_pairs(int64_t n, const Term& term) {
  constexpr int kLanes = 16;
  alignas(64) float first[kLanes] = {}, second[kLanes] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      const Pair a = term(i + j), b = term(i + kLanes + j);
      first[j] += a.first + b.first;
      second[j] += a.second + b.second;
    }
  }
  for (; i < n; i += kLanes) {
    const int64_t left = std::min<int64_t>(kLanes, n - i);
#pragma omp simd
    for (int64_t j = 0; j < left; ++j) {
      const Pair a = term(i + j);
      first[j] += a.first;
      second[j] += a.second;
    }
  }
  return {fold(first), fold(second)};
}

// The sum of a[i] b[i]. Eight lanes: the rows are heads, and more lanes would take longer to fold than they save.
template <typename W>
ATAT_FAST_INLINE W dot(const W* a, const W* b, int64_t n) {
  constexpr int kLanes = 8;
  alignas(64) W lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) lane[j] += a[i + j] * b[i + j];
  }
  for (int j = 0; i + j < n; ++j) lane[j] += a[i + j] * b[i + j];
  return fold(lane);
}

// Two neighbours share a word. The word shifted up is the lower one in fp32, and with its low half cleared it is the upper one,
// so nothing has to be unpacked.
ATAT_FAST_INLINE float dot(const Half* a, const Half* b, int64_t n) {
  constexpr int kLanes = 8;
  alignas(64) float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    uint32_t p[kLanes], q[kLanes];
    std::memcpy(p, a + i, sizeof(p));
    std::memcpy(q, b + i, sizeof(q));
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      lane[j] += float_from_bits(p[j] << 16) * float_from_bits(q[j] << 16) +
                 float_from_bits(p[j] & 0xffff0000u) * float_from_bits(q[j] & 0xffff0000u);
    }
  }
  for (; i < n; ++i) lane[i % kLanes] += widened(a[i]) * widened(b[i]);
  return fold(lane);
}

}  // namespace atat_fast
