// ATAT_FAST_INLINE before a function: always inlined; in CUDA code both the host and the device have it.
#pragma once

#ifdef __CUDACC__
#define ATAT_FAST_INLINE __host__ __device__ __forceinline__
#else
#define ATAT_FAST_INLINE inline __attribute__((always_inline))
#endif
