// mask_tokens on the CPU. A sequence takes three passes over its tokens: words (vectorised), the threshold (radix select) and the
// outputs. Its keys stay in the first-level cache, and threads share the sequences. A word is ten rounds of two 32 x 32 -> 64
// products, and a vector does four or eight of those at a time.

#include "../common/vectorised.h"
#include "op.h"

#include <algorithm>
#include <cmath>

namespace atat_fast {
namespace {

// A thread gets sequences of about this many tokens at a time.
constexpr int64_t kTokensPerTask = 8192;

ATAT_FAST_VECTORISED void fill_words(uint32_t* words, int64_t length, uint64_t first, uint64_t seed, uint32_t step,
                                     uint32_t stream) {
  for (int64_t i = 0; i < length; ++i) {
    words[i] = random_words(first + static_cast<uint64_t>(i), seed, step, stream).word[0];
  }
}

template <typename Id>
ATAT_FAST_VECTORISED void fill_noisy(Id* noisy, const Id* tokens, const uint8_t* hidden, int64_t length, Id mask_id) {
  for (int64_t i = 0; i < length; ++i) noisy[i] = hidden[i] ? mask_id : tokens[i];
}

// Working memory of one thread.
struct Scratch {
  explicit Scratch(int64_t length) : keys(length), may_hide(length), hidden(length), positions(length + 1) {}
  std::vector<uint32_t> keys;
  std::vector<uint8_t> may_hide, hidden;
  std::vector<int32_t> positions;  // one longer: the loop that fills it stores before it knows whether to keep
};

// Marks hidden tokens and lists their positions. Returns how many there are.
int32_t hide_under(Threshold threshold, const uint8_t* may_hide, int64_t length, Scratch& scratch) {
  int32_t found = 0, ties = threshold.ties;
  for (int64_t i = 0; i < length; ++i) {
    const uint32_t key = scratch.keys[i];
    const bool may = may_hide == nullptr || may_hide[i];
    const bool tie = may & (key == threshold.key);
    const bool hide = (may & (key < threshold.key)) | (tie & (ties > 0));
    ties -= tie;
    scratch.hidden[i] = hide;
    scratch.positions[found] = static_cast<int32_t>(i);
    found += hide;
  }
  return found;
}

// Weights of one sequence's hidden tokens; the softmax is fp64, as in the specification.
void fill_weights(float* weights, int32_t count, const MaskArguments& a, const float* scores, const Scratch& scratch,
                  double free) {
  if (a.weighting == kUniform) {
    for (int32_t j = 0; j < count; ++j) weights[j] = static_cast<float>((free + 1) / count);
    return;
  }
  double largest = -INFINITY, total = 0;
  const auto exponent = [&](int32_t j) {
    return static_cast<double>(a.weighting == kOrder ? -a.tilt : a.focus) * scores[scratch.positions[j]];
  };
  for (int32_t j = 0; j < count; ++j) largest = std::fmax(largest, exponent(j));
  for (int32_t j = 0; j < count; ++j) total += std::exp(exponent(j) - largest);
  for (int32_t j = 0; j < count; ++j) weights[j] = static_cast<float>((free + 1) * (std::exp(exponent(j) - largest) / total));
}

int64_t count_free(const uint8_t* frozen, int64_t tokens) {
  int64_t free = tokens;
  for (int64_t i = 0; frozen != nullptr && i < tokens; ++i) free -= frozen[i];
  return free;
}

template <typename Id>
void mask_sequence(const MaskArguments& a, int64_t b, int64_t offset, float ce_weight, Scratch& scratch) {
  const int64_t start = b * a.length;
  const float* scores = a.scores == nullptr ? nullptr : a.scores + start;
  const uint8_t* frozen = a.frozen == nullptr ? nullptr : a.frozen + start;
  const uint8_t* eligible = a.eligible == nullptr ? nullptr : a.eligible + start;

  const uint8_t* may_hide = eligible;
  int64_t limit = a.length;
  if (frozen != nullptr) {
    for (int64_t i = 0; i < a.length; ++i) scratch.may_hide[i] = !frozen[i] && (eligible == nullptr || eligible[i]);
    may_hide = scratch.may_hide.data();
  }
  if (may_hide != nullptr) {
    limit = 0;
    for (int64_t i = 0; i < a.length; ++i) limit += may_hide[i];
  }
  const int32_t wanted = clamp_count(a.num_masked[b], limit);

  Threshold threshold = wanted == 0 ? hide_none() : hide_all();
  if (wanted > 0 && wanted < limit) {
    const uint64_t first = static_cast<uint64_t>(a.sample_ids[b]) * static_cast<uint64_t>(a.length);
    const uint64_t seed = static_cast<uint64_t>(*a.seed);
    const uint32_t step = static_cast<uint32_t>(*a.step);
    fill_words(scratch.keys.data(), a.length, first, seed, step, a.stream);
    if (a.tilted()) {
      for (int64_t i = 0; i < a.length; ++i) scratch.keys[i] = tilted_key(scratch.keys[i], scores[i], a.tilt);
    }
    const Spread spread(a, first, seed, step, clamp_count(a.num_masked[b], a.length));
    if (spread.chosen) {
      for (int64_t i = 0; i < a.length; ++i) scratch.keys[i] = Spread::passed_over(scratch.keys[i]);
      for (int64_t cell = 0; cell < spread.cells; ++cell) {
        uint32_t& key = scratch.keys[spread.position(cell, first, seed, step)];
        key = Spread::drawn(key);
      }
    }
    threshold = select_threshold(scratch.keys.data(), may_hide, a.length, wanted);
  }
  const int32_t count = hide_under(threshold, may_hide, a.length, scratch);

  fill_noisy(static_cast<Id*>(a.noisy) + start, static_cast<const Id*>(a.tokens) + start, scratch.hidden.data(), a.length,
             static_cast<Id>(a.mask_id));
  // Only invalid counts leave slots beyond num_rows or beyond `count`. The latter have weight 0.
  const int64_t slots = std::min<int64_t>(clamp_count(a.num_masked[b], a.length), a.num_rows - offset);
  if (slots <= 0) return;
  const auto kept = static_cast<int32_t>(std::min<int64_t>(count, slots));
  for (int32_t j = 0; j < kept; ++j) a.rows[offset + j] = start + scratch.positions[j];
  if (a.weighting == kCrossEntropy) {
    std::fill_n(a.weights + offset, kept, ce_weight);
  } else if (kept == count) {
    fill_weights(a.weights + offset, count, a, scores, scratch, static_cast<double>(count_free(frozen, a.length)));
  } else {
    std::fill_n(a.weights + offset, kept, 0.0f);
  }
  std::fill_n(a.rows + offset + kept, slots - kept, 0);
  std::fill_n(a.weights + offset + kept, slots - kept, 0.0f);
}

void mask_tokens_cpu(const MaskArguments& a, const Tensor&) {
  std::vector<int64_t> offsets(a.batch + 1, 0);
  for (int64_t b = 0; b < a.batch; ++b) offsets[b + 1] = offsets[b] + clamp_count(a.num_masked[b], a.length);
  const int64_t total = offsets[a.batch];
  if (total < a.num_rows) {
    std::fill_n(a.rows + total, a.num_rows - total, 0);
    std::fill_n(a.weights + total, a.num_rows - total, 0.0f);
  }
  if (a.batch == 0 || a.length == 0) return;
  float ce_weight = 0;
  if (a.weighting == kCrossEntropy) {
    ce_weight = static_cast<float>(count_free(a.frozen, a.batch * a.length)) / static_cast<float>(std::max<int64_t>(total, 1));
  }
  const int64_t grain = std::max<int64_t>(1, kTokensPerTask / a.length);
  torch::stable::parallel_for(0, a.batch, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(a.length);
    for (int64_t b = begin; b < end; ++b) {
      if (a.wide_ids) {
        mask_sequence<int64_t>(a, b, offsets[b], ce_weight, scratch);
      } else {
        mask_sequence<int32_t>(a, b, offsets[b], ce_weight, scratch);
      }
    }
  });
}

}  // namespace
}  // namespace atat_fast

STABLE_TORCH_LIBRARY_IMPL(atat_fast_c, CPU, m) {
  m.impl("mask_tokens", TORCH_BOX(&atat_fast::mask_tokens<&atat_fast::mask_tokens_cpu>));
}
