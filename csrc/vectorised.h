// ATAT_FAST_VECTORISED before a function: one body for three instruction sets, chosen when the library loads. Its loops are written
// for the compiler to vectorise; `omp simd` (-fopenmp-simd) says that their iterations do not depend on one another, and `omp simd
// reduction` lets it reorder the sums it names and nothing else.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define ATAT_FAST_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ATAT_FAST_VECTORISED
#endif
