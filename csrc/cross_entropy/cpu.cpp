// The row pass of linear_cross_entropy on the CPU: a slab of logits becomes its own gradient in place. A row goes in blocks that
// stay in the first-level cache: each block once for its largest logit and its exponentials relative to that, and once more, when
// the row's sum is known, to scale them. The cut of rows into tasks depends on their number only, so the bias's gradient is the
// same bits for any number of threads.

#include "../common/rows.h"
#include "op.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace atat_fast {
namespace {

constexpr int64_t kBlock = 1024;
constexpr int64_t kRowsPerTask = 16;
constexpr int64_t kMostTasks = 32;

// e^x for x <= 0 to about one unit in the last place, with exact 0 below the smallest normal number and for -inf; NaN stays NaN.
// Cephes' expf: x = n ln 2 + r, a polynomial in r, and n added to the exponent. Adding 1.5 * 2^23 rounds to an integer and leaves
// it in the low bits.
ATAT_FAST_INLINE float exp_of_negative(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float power = float_from_bits((bits_of_float(shifted) << 23) + 0x3F800000u);
  return x < -87.0f ? 0.0f : p * power;
}

// Logits of one block to their exponentials relative to the largest of them, in place.
ATAT_FAST_VECTORISED RowPart exponentials(float* z, int64_t count, bool moment) {
  float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) largest = z[i] > largest ? z[i] : largest;
  const float base = largest == -INFINITY ? 0.0f : largest;
  float sum = 0, moments = 0;
  if (moment) {
#pragma omp simd reduction(+ : sum, moments)
    for (int64_t i = 0; i < count; ++i) {
      const float x = z[i] - base, e = exp_of_negative(x);
      z[i] = e;
      sum += e;
      moments += e * (x < -87.0f ? 0.0f : x);
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) {
      const float e = exp_of_negative(z[i] - base);
      z[i] = e;
      sum += e;
    }
  }
  return {largest, sum, moments};
}

ATAT_FAST_VECTORISED void scale(float* out, float factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] *= factor;
}

ATAT_FAST_VECTORISED float dot(const Half* a, const Half* b, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += from_bfloat16(a[i]) * from_bfloat16(b[i]);
  return sum;
}

ATAT_FAST_VECTORISED float dot(const float* a, const float* b, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// Turns logits z into z - elapsed * rate. The next function turns a gradient without rates into one with them.
ATAT_FAST_VECTORISED void age(float* z, const float* rates, float elapsed, int64_t count) {
  for (int64_t i = 0; i < count; ++i) z[i] -= elapsed * rates[i];
}

ATAT_FAST_VECTORISED void scale_by_rates(float* gradient, const float* rates, float speed, int64_t count) {
  for (int64_t i = 0; i < count; ++i) gradient[i] *= rates[i] - speed;
}

// A row is computed in place only if it is fp32 and becomes the gradient.
bool in_place(const RowArguments& a) { return !a.half && a.gradient; }

// Working memory of one thread: a row in fp32, and each block's part and sum of rate * e^(z - its largest).
struct Scratch {
  explicit Scratch(const RowArguments& a)
      : row(in_place(a) ? 0 : a.columns),
        parts((a.columns + kBlock - 1) / kBlock),
        rated(a.rates == nullptr ? 0 : parts.size()) {}
  std::vector<float> row;
  std::vector<RowPart> parts;
  std::vector<float> rated;
};

// The target's logit, computed again from the inputs if they are given, because a stored bf16 logit is rounded.
template <typename T>
float target_logit(const RowArguments& a, int64_t i, int64_t target) {
  if (a.hidden == nullptr) return widened(static_cast<const T*>(a.logits)[i * a.stride + target]);
  const float bias = a.bias == nullptr ? 0 : widened(static_cast<const T*>(a.bias)[target]);
  return bias + dot(static_cast<const T*>(a.hidden) + i * a.width, static_cast<const T*>(a.weight) + target * a.width, a.width);
}

void empty_row(const RowArguments& a, int64_t i) {
  report(a, i, RowResult{});
  if (a.velocity != nullptr) a.velocity[i] = 0;
  if (!a.gradient) return;
  const int64_t size = a.half ? sizeof(Half) : sizeof(float);
  memset(static_cast<char*>(a.logits) + i * a.stride * size, 0, a.columns * size);
}

void one_row(const RowArguments& a, int64_t i, float* bias_gradient, Scratch& scratch) {
  const float weight = a.token_weight == nullptr ? 1.0f : a.token_weight[i];
  if (weight == 0) return empty_row(a, i);
  auto* halves = static_cast<Half*>(a.logits) + i * a.stride;
  auto* floats = static_cast<float*>(a.logits) + i * a.stride;
  float* row = in_place(a) ? floats : scratch.row.data();
  const int64_t target = a.target[i];
  const bool inside = target >= 0 && target < a.vocabulary;
  float at_target = !inside ? NAN : a.half ? target_logit<Half>(a, i, target) : target_logit<float>(a, i, target);
  const float elapsed = a.elapsed == nullptr ? 0.0f : a.elapsed[i];
  const float own_rate = a.rates != nullptr && inside ? a.rates[target] : 0.0f;
  at_target -= elapsed * own_rate;
  const int64_t target_block = inside ? target / kBlock : -1;

  RowPart others = no_logits();
  for (int64_t start = 0, k = 0; start < a.columns; start += kBlock, ++k) {
    const int64_t count = std::min(kBlock, a.columns - start);
    if (a.half) {
      widen_row(row + start, halves + start, count);
    } else if (!in_place(a)) {
      std::copy_n(floats + start, count, row + start);
    }
    if (k == target_block) row[target] = -INFINITY;
    if (a.elapsed != nullptr) age(row + start, a.rates + start, elapsed, count);
    scratch.parts[k] = exponentials(row + start, count, a.entropy != nullptr);
    if (a.rates != nullptr) scratch.rated[k] = dot(row + start, a.rates + start, count);
    others = merge(others, scratch.parts[k]);
  }

  RowResult result = finish(others, inside ? at_target : -INFINITY, weight);
  if (!inside) result.nll = NAN;
  report(a, i, result);
  RateResult rates{0, result.at_target};
  if (a.rates != nullptr) {
    float of_others = 0;
    for (size_t k = 0; k < scratch.parts.size(); ++k) {
      if (scratch.parts[k].sum != 0) of_others += scratch.rated[k] * std::exp(scratch.parts[k].largest - result.largest);
    }
    rates = finish_rates(result, of_others * result.max_probability, own_rate, weight);
    a.velocity[i] = inside ? rates.speed : NAN;
  }
  if (!a.gradient) return;

  for (int64_t start = 0, k = 0; start < a.columns; start += kBlock, ++k) {
    const int64_t count = std::min(kBlock, a.columns - start);
    const RowPart part = scratch.parts[k];
    scale(row + start, part.sum == 0 ? 0.0f : result.scale * std::exp(part.largest - result.largest), count);
    if (a.rates != nullptr) scale_by_rates(row + start, a.rates + start, rates.speed, count);
    if (k == target_block) row[target] = rates.at_target;
    if (a.half) narrow_row(halves + start, row + start, count);
    if (bias_gradient != nullptr) add_row(bias_gradient + start, row + start, count);
  }
}

void cross_entropy_cpu(const RowArguments& a, const Tensor&) {
  const int64_t tasks = std::min(kMostTasks, (a.rows + kRowsPerTask - 1) / kRowsPerTask);
  const bool sums = a.bias_gradient != nullptr && a.gradient;
  std::vector<float> partial(sums ? tasks * a.columns : 0, 0.0f);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    Scratch scratch(a);
    for (int64_t task = first; task < last; ++task) {
      float* own = sums ? partial.data() + task * a.columns : nullptr;
      for (int64_t i = a.rows * task / tasks; i < a.rows * (task + 1) / tasks; ++i) one_row(a, i, own, scratch);
    }
  });
  if (!sums) return;
  torch::stable::parallel_for(0, (a.columns + kBlock - 1) / kBlock, 1, [&](int64_t first, int64_t last) {
    const int64_t start = first * kBlock, count = std::min(last * kBlock, a.columns) - start;
    for (int64_t task = 0; task < tasks; ++task) {
      add_row(a.bias_gradient + start, partial.data() + task * a.columns + start, count);
    }
  });
}

}  // namespace
}  // namespace atat_fast

STABLE_TORCH_LIBRARY_IMPL(atat_fast_c, CPU, m) {
  m.impl("cross_entropy_", TORCH_BOX(&atat_fast::cross_entropy<&atat_fast::cross_entropy_cpu>));
}
