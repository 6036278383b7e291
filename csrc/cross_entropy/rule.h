// The arithmetic of one row of linear_cross_entropy that host and device share: the sum of a row's parts, and from it the loss
// and its gradient. Plain C++, so that all of it is tested on the host.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/inline.h"

namespace atat_fast {

// One slab on plain pointers. All tensors but logits are contiguous; null stands for a tensor that was not given.
struct RowArguments {
  void* logits;              // [rows, columns], `stride` elements from row to row; overwritten if `gradient`
  const int64_t* target;     // [rows]
  const float* token_weight; // [rows]
  const void* hidden;        // [rows, width], as logits
  const void* weight;        // [vocabulary or more, width], as logits
  const void* bias;          // [columns], as logits
  float* nll;                // [rows]
  float* max_probability;    // [rows]
  float* entropy;            // [rows]
  float* bias_gradient;      // [columns], added to
  const float* rates;        // [columns]; given with velocity, and elapsed only with both
  const float* elapsed;      // [rows]
  float* velocity;           // [rows]
  int64_t rows, columns, stride, width;
  int64_t vocabulary;        // targets lie below it; columns past it are padding
  bool gradient;
  bool half;                 // logits, hidden, weight and bias are bf16; else fp32
};

// Some of a row's logits z, without the target's: the largest, sum e^(z - largest), and sum e^(z - largest) (z - largest).
struct RowPart {
  float largest;
  float sum;
  float moment;
};

ATAT_FAST_INLINE RowPart no_logits() { return {-INFINITY, 0, 0}; }

ATAT_FAST_INLINE RowPart rebase(RowPart part, float largest) {
  const float shift = part.largest - largest;
  if (part.sum == 0 || shift == 0) return {largest, part.sum, part.moment};  // nothing to move, and no -inf - -inf
  const float factor = expf(shift);
  return {largest, part.sum * factor, factor > 0 ? factor * (part.moment + part.sum * shift) : 0};
}

ATAT_FAST_INLINE RowPart merge(RowPart a, RowPart b) {
  const float largest = a.largest > b.largest ? a.largest : b.largest;
  const RowPart x = rebase(a, largest), y = rebase(b, largest);
  return {largest, x.sum + y.sum, x.moment + y.moment};
}

// A row's result. The gradient of weight * nll is `at_target` at the target and `scale` * e^(z - largest) elsewhere.
struct RowResult {
  float nll, max_probability, entropy;
  float largest, scale, at_target;
  float others_share, own_share;  // of the probability: all but the target's, and the target's
};

// Writes the results of row i.
ATAT_FAST_INLINE void report(const RowArguments& a, int64_t i, const RowResult& result) {
  a.nll[i] = result.nll;
  if (a.max_probability != nullptr) a.max_probability[i] = result.max_probability;
  if (a.entropy != nullptr) a.entropy[i] = result.entropy;
}

// `others` is the whole row without its target. The target's gradient is taken from the others' sum, because p - 1 cancels; so is
// the loss of a row that is nearly certain.
ATAT_FAST_INLINE RowResult finish(RowPart others, float at_target, float weight) {
  const bool first = at_target >= others.largest;
  const float largest = first ? at_target : others.largest;
  const RowPart rest = rebase(others, largest);
  const float own = expf(at_target - largest), total = rest.sum + own;
  const float log_total = first ? log1pf(rest.sum) : logf(total);
  RowResult result;
  result.nll = log_total + (largest - at_target);  // an infinite largest makes this NaN, as it makes everything else
  result.max_probability = 1 / total;
  const float own_moment = own > 0 ? own * (at_target - largest) : 0;
  const float entropy = log_total - (rest.moment + own_moment) / total;
  result.entropy = entropy < 0 ? 0 : entropy;
  result.largest = largest;
  result.scale = weight / total;
  result.others_share = rest.sum / total;
  result.own_share = own / total;
  result.at_target = -weight * result.others_share;
  return result;
}

// With rates: the gradient is `at_target` at the target and `scale` * e^(z - largest) * (rate - speed) elsewhere. `speed` is the
// reported velocity: the sum of rate * p, minus the target's rate.
struct RateResult {
  float speed, at_target;
};

// of_others is the sum of rate * p over all but the target. Its terms have one sign, so nothing cancels in a row that is certain.
ATAT_FAST_INLINE RateResult finish_rates(const RowResult& row, float of_others, float own_rate, float weight) {
  const float q = row.others_share;
  return {of_others - own_rate * q, -weight * (own_rate * q * q + of_others * row.own_share)};
}

}  // namespace atat_fast
