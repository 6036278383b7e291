// The row pass of linear_categorical on the CPU: a slab of logits to one id a row by the Gumbel-max rule. It is bound by arithmetic:
// ten rounds of Philox for every two logits, and two logarithms for each. All of it is written so that the compiler does it on
// vectors; a row is taken in blocks that stay in registers and the first-level cache.

#include "bfloat16.h"
#include "linear_categorical.h"
#include "vectorised.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace atat_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 512;  // columns; even, so that a block begins with a part of its own

// log(2^exponent (1 + x)) for 1 + x in [sqrt(1/2), sqrt(2)): Cephes' logf, good to about a unit in the last place.
ATAT_FAST_INLINE float log_of(float x, float exponent) {
  float p = 7.0376836292e-2f;
  p = p * x - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  const float square = x * x;
  float y = p * x * square + exponent * -2.12194440e-4f - 0.5f * square;
  return x + y + exponent * 0.693359375f;
}

// All bits of `yes` where the mask has them, of `no` elsewhere. A conditional on floats would be a branch to the compiler, which may
// not compute what is not needed (it could trap), and a loop with a branch is no vector loop.
ATAT_FAST_INLINE float pick(uint32_t mask, float yes, float no) {
  return float_from_bits((bits_of_float(yes) & mask) | (bits_of_float(no) & ~mask));
}

ATAT_FAST_INLINE uint32_t mask_of(bool yes) { return 0u - static_cast<uint32_t>(yes); }

// value = 2^exponent (1 + x), as log_of takes it, for a positive normal number.
ATAT_FAST_INLINE void split(float value, float& x, float& exponent) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t mantissa = (bits & 0x007FFFFFu) | 0x3F000000u;  // in [1/2, 1)
  const uint32_t low = mask_of(mantissa < 0x3F3504F3u);          // below sqrt(1/2)
  exponent = static_cast<float>(static_cast<int32_t>((bits >> 23) - 126u + low));
  x = float_from_bits(mantissa + (low & 0x00800000u)) - 1.0f;
}

// gumbel64 of philox.h without calls. -log1p(-small) is log_of's too: 1 - small = 1 + x with x = -small, or (1 + x) / 2 with
// x = 1 - 2 small, both exact.
ATAT_FAST_INLINE float gumbel_of(uint32_t high, uint32_t low) {
  const uint32_t over = 0u - (high >> 31);
  const float top = static_cast<float>(static_cast<int32_t>(high ^ over));
  const uint32_t rest = low ^ over;
  const float upper = static_cast<float>(static_cast<int32_t>(rest >> 16)), lower = static_cast<float>(static_cast<int32_t>(rest & 0xFFFFu));
  const float small = (top + (upper * 65536.0f + (lower + 0.5f)) * 0x1p-32f) * 0x1p-32f;
  float x, exponent;
  split(small, x, exponent);
  const uint32_t far = mask_of(bits_of_float(small) >= 0x3E95F61Au);  // 1 - sqrt(1/2)
  x = pick(over, pick(far, 1.0f - 2.0f * small, -small), x);
  exponent = pick(over, pick(far, -1.0f, 0.0f), exponent);
  split(-log_of(x, exponent), x, exponent);
  return -log_of(x, exponent);
}

// Noise of columns 2 * first .. 2 * (first + parts) - 1 of the row named by `index`.
ATAT_FAST_VECTORISED void fill_noise(float* noise, uint32_t first, int64_t parts, uint64_t index, uint64_t seed, uint32_t step) {
  uint32_t words[4][kBlock / 2];
  for (int64_t j = 0; j < parts; ++j) {
    const PhiloxWords w = random_words(index, seed, step, token_stream(first + static_cast<uint32_t>(j)));
    words[0][j] = w.word[0];
    words[1][j] = w.word[1];
    words[2][j] = w.word[2];
    words[3][j] = w.word[3];
  }
  for (int odd = 0; odd < 2; ++odd) {
    float values[kBlock / 2];
    const uint32_t *high = words[2 * odd], *low = words[2 * odd + 1];
    for (int64_t j = 0; j < parts; ++j) values[j] = gumbel_of(high[j], low[j]);
    for (int64_t j = 0; j < parts; ++j) noise[2 * j + odd] = values[j];
  }
}

ATAT_FAST_INLINE float widened(uint16_t value) { return from_bfloat16(value); }
ATAT_FAST_INLINE float widened(float value) { return value; }

// Scores of some columns, in place of their noise. Returns the largest, or NaN where there is one.
template <typename T>
ATAT_FAST_INLINE float scores_of(float* noise, const T* logits, int64_t count, float inverse_temperature) {
  float largest = -INFINITY;
  int32_t wrong = 0;
#pragma omp simd reduction(max : largest) reduction(+ : wrong)
  for (int64_t i = 0; i < count; ++i) {
    const float score = widened(logits[i]) * inverse_temperature + noise[i];
    noise[i] = score;
    wrong += score != score;
    largest = score > largest ? score : largest;
  }
  return wrong ? NAN : largest;
}

ATAT_FAST_VECTORISED float add_logits(float* noise, const float* logits, int64_t count, float inverse_temperature) {
  return scores_of(noise, logits, count, inverse_temperature);
}

ATAT_FAST_VECTORISED float add_halves(float* noise, const uint16_t* logits, int64_t count, float inverse_temperature) {
  return scores_of(noise, logits, count, inverse_temperature);
}

ATAT_FAST_INLINE float add(float* n, const float* z, int64_t count, float inverse) { return add_logits(n, z, count, inverse); }
ATAT_FAST_INLINE float add(float* n, const uint16_t* z, int64_t count, float inverse) { return add_halves(n, z, count, inverse); }

float largest_of(const float* scores, int64_t count) {
  float largest = -INFINITY;
  for (int64_t i = 0; i < count; ++i) {
    if (scores[i] != scores[i]) return NAN;
    largest = scores[i] > largest ? scores[i] : largest;
  }
  return largest;
}

// The winner of columns start .. stop - 1, start even.
template <typename T>
Winner race(const T* logits, int64_t start, int64_t stop, int64_t forbidden, float inverse_temperature, uint64_t index,
            uint64_t seed, uint32_t step) {
  float scores[kBlock];
  Winner winner = nobody();
  for (int64_t from = start; from < stop; from += kBlock) {
    const int64_t count = std::min(kBlock, stop - from);
    fill_noise(scores, static_cast<uint32_t>(from / 2), (count + 1) / 2, index, seed, step);
    float largest = add(scores, logits + from, count, inverse_temperature);
    if (forbidden >= from && forbidden < from + count) {  // whatever its logit is, +inf and NaN included
      scores[forbidden - from] = -INFINITY;
      largest = largest_of(scores, count);
    }
    if (largest != largest) return {NAN, -1};
    if (largest > winner.score) winner = {largest, from + (std::find(scores, scores + count, largest) - scores)};
  }
  return winner;
}

template <typename T>
void draw(const Tensor& logits, const int64_t* index, int64_t forbidden, float inverse_temperature, uint64_t seed, uint32_t step,
          int64_t* ids) {
  const int64_t rows = logits.size(0), columns = logits.size(1), stride = logits.stride(0);
  const T* z = static_cast<const T*>(logits.const_data_ptr());
  const int64_t split = (columns / 2 + kBlock - 1) / kBlock * kBlock;  // a row is two tasks, so that one row keeps two threads busy
  std::vector<Winner> winners(2 * rows);
  torch::stable::parallel_for(0, 2 * rows, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task / 2, start = task % 2 ? split : 0, stop = task % 2 ? columns : std::min(split, columns);
      winners[task] = race(z + row * stride, start, stop, forbidden, inverse_temperature, static_cast<uint64_t>(index[row]), seed, step);
    }
  });
  for (int64_t row = 0; row < rows; ++row) ids[row] = better(winners[2 * row], winners[2 * row + 1]).id;
}

Tensor linear_categorical(Tensor logits, Tensor index, int64_t forbidden, double inverse_temperature, Tensor seed, Tensor step) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 2 && (logits.numel() == 0 || logits.stride(1) == 1),
                  "linear_categorical takes logits [R, V] on the CPU, dense in V");
  for (const Tensor* tensor : {&index, &seed, &step}) {
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->scalar_type() == ScalarType::Long, "linear_categorical takes int64 on the CPU");
  }
  STD_TORCH_CHECK(index.dim() == 1 && index.size(0) == logits.size(0) && index.is_contiguous(), "one index for each row of logits");
  STD_TORCH_CHECK(seed.numel() == 1 && step.numel() == 1, "linear_categorical takes one seed and one step");
  Tensor ids = torch::stable::new_empty(index, {index.size(0)});
  const auto key = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  const auto now = static_cast<uint32_t>(*step.const_data_ptr<int64_t>());
  const auto inverse = static_cast<float>(inverse_temperature);
  const int64_t* names = index.const_data_ptr<int64_t>();
  int64_t* out = ids.mutable_data_ptr<int64_t>();
  if (logits.scalar_type() == ScalarType::Float) {
    draw<float>(logits, names, forbidden, inverse, key, now, out);
  } else {
    STD_TORCH_CHECK(logits.scalar_type() == ScalarType::BFloat16, "linear_categorical takes fp32 or bf16 on the CPU");
    draw<uint16_t>(logits, names, forbidden, inverse, key, now, out);
  }
  return ids;
}

}  // namespace
}  // namespace atat_fast

STABLE_TORCH_LIBRARY_IMPL(atat_fast_c, CPU, m) {
  m.impl("linear_categorical", TORCH_BOX(&atat_fast::linear_categorical));
}
