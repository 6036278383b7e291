// Loops over rows of elements on the CPU.
#pragma once

#include <cstdint>

#include "bfloat16.h"
#include "vectorised.h"

namespace atat_fast {
namespace {

ATAT_FAST_VECTORISED void widen_row(float* out, const Half* in, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_bfloat16(in[i]);
}

ATAT_FAST_VECTORISED void narrow_row(Half* out, const float* in, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(in[i]);
}

ATAT_FAST_VECTORISED void add_row(float* sum, const float* term, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sum[i] += term[i];
}

}  // namespace
}  // namespace atat_fast
