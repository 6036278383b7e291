// Reductions over a warp. They use few of CUDA's words, so that tests can also run them on a CPU.
#pragma once

#include <cstdint>

namespace atat_fast {

constexpr uint32_t kWholeWarp = 0xFFFFFFFFu;

// The largest of all lanes, returned to all.
__device__ inline float warp_max(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, distance));
  return value;
}

__device__ inline float warp_sum(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kWholeWarp, value, distance);
  return value;
}

// The sum of the lanes up to and including this one.
__device__ inline int32_t warp_inclusive_sum(int32_t value) {
  const int lane = threadIdx.x % 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t lower = __shfl_up_sync(kWholeWarp, value, distance);
    if (lane >= distance) value += lower;
  }
  return value;
}

}  // namespace atat_fast
