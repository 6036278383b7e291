// ATAT_FAST_VECTORISED before a function compiles it for three instruction sets; the loader picks one. The compiler vectorises
// its loops: `omp simd` (-fopenmp-simd) promises that iterations are independent, and `omp simd reduction` lets the compiler
// reorder the sums it names and no others.
#pragma once

#include <cstdint>  // defines __GLIBC__

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define ATAT_FAST_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ATAT_FAST_VECTORISED
#endif
