// The row pass of linear_categorical on the CPU: a slab of logits to one id a row by the Gumbel-max rule. Arithmetic bounds it:
// ten rounds of Philox for every two logits, and two logarithms for each. All of it is written so that the compiler vectorises
// it. A row goes in blocks that stay in registers and the first-level cache.

#include "../common/bfloat16.h"
#include "../common/tensor.h"
#include "../common/vectorised.h"
#include "rule.h"

#include <algorithm>
#include <cmath>

namespace atat_fast {
namespace {

constexpr int64_t kBlock = 512;  // columns; even, so that a block begins with a new part of the stream

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

// The bits of `yes` that the mask has, and the other bits of `no`. The compiler would turn a conditional on floats into a branch,
// because computing the side that is not needed could trap, and it does not vectorise a loop with a branch.
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

// gumbel64 of common/philox.h without calls. log_of does -log1p(-small) too: 1 - small = 1 + x with x = -small, or (1 + x) / 2
// with x = 1 - 2 small, both exact.
ATAT_FAST_INLINE float gumbel_of(uint32_t high, uint32_t low) {
  const uint32_t over = 0u - (high >> 31);
  const float top = static_cast<float>(static_cast<int32_t>(high ^ over));
  const uint32_t rest = low ^ over;
  const float upper = static_cast<float>(static_cast<int32_t>(rest >> 16));
  const float lower = static_cast<float>(static_cast<int32_t>(rest & 0xFFFFu));
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

// Scores of some columns, in place of their noise. Returns the largest, or NaN if one is NaN.
template <typename T>
ATAT_FAST_VECTORISED float add_logits(float* noise, const T* logits, int64_t count, float inverse_temperature) {
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
    float largest = add_logits(scores, logits + from, count, inverse_temperature);
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
  const int64_t split = (columns / 2 + kBlock - 1) / kBlock * kBlock;  // a row is two tasks, so one row keeps two threads busy
  std::vector<Winner> winners(2 * rows);
  torch::stable::parallel_for(0, 2 * rows, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task / 2, start = task % 2 ? split : 0, stop = task % 2 ? columns : std::min(split, columns);
      const auto own = static_cast<uint64_t>(index[row]);
      winners[task] = race(z + row * stride, start, stop, forbidden, inverse_temperature, own, seed, step);
    }
  });
  for (int64_t row = 0; row < rows; ++row) ids[row] = better(winners[2 * row], winners[2 * row + 1]).id;
}

Tensor linear_categorical(Tensor logits, Tensor index, int64_t forbidden, double inverse_temperature, Tensor seed, Tensor step) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 2 && (logits.numel() == 0 || logits.stride(1) == 1),
                  "linear_categorical takes logits [R, V] on the CPU, dense in V");
  const bool half = is_half("linear_categorical", logits.scalar_type());
  Reader reader("linear_categorical", logits);
  const int64_t* names = reader.read<int64_t>(index, "index", logits.size(0));
  const auto key = static_cast<uint64_t>(*reader.read<int64_t>(seed, "seed", 1));
  const auto now = static_cast<uint32_t>(*reader.read<int64_t>(step, "step", 1));
  const auto inverse = static_cast<float>(inverse_temperature);
  Tensor ids = torch::stable::new_empty(index, {logits.size(0)});
  int64_t* out = ids.mutable_data_ptr<int64_t>();
  const auto draw_ids = half ? &draw<Half> : &draw<float>;
  draw_ids(logits, names, forbidden, inverse, key, now, out);
  return ids;
}

}  // namespace
}  // namespace atat_fast

STABLE_TORCH_LIBRARY_IMPL(atat_fast_c, CPU, m) {
  m.impl("linear_categorical", TORCH_BOX(&atat_fast::linear_categorical));
}
