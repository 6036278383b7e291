// The rules of mask_tokens that host and device share: the key of a token, the order of keys, and the radix select that finds
// which keys are hidden. Plain C++, so that each of them is tested on the host.
#pragma once

#include <climits>
#include <cstdint>

#include "../common/bfloat16.h"
#include "../common/philox.h"

namespace atat_fast {

// In the order of WEIGHTINGS in atat_fast/ops/masking.py.
enum Weighting : int { kUniform = 0, kOrder = 1, kImportance = 2, kCrossEntropy = 3 };

constexpr uint32_t kStreamSpread = 8;  // STREAM_SPREAD in atat_fast/ops/philox.py

// One call on plain pointers. Tensors are contiguous; null stands for a tensor that was not given.
struct MaskArguments {
  const void* tokens;         // [batch, length] int64 if wide_ids, else int32
  const int64_t* num_masked;  // [batch]
  const int64_t* sample_ids;  // [batch]
  const int64_t* seed;
  const int64_t* step;
  const float* scores;      // [batch, length]
  const uint8_t* eligible;  // [batch, length] 0 or 1
  const uint8_t* frozen;    // [batch, length] 0 or 1
  void* noisy;              // as tokens
  int64_t* rows;            // [num_rows]
  float* weights;           // [num_rows]
  int64_t batch, length, num_rows, mask_id;
  int64_t spread;  // in units of 2^-32: the chance that hidden tokens are spread evenly or, below 0, are one span
  float tilt, focus;
  int weighting;
  uint32_t stream;
  bool wide_ids;

  ATAT_FAST_INLINE bool tilted() const { return scores != nullptr && tilt != 0; }
};

// Unsigned integers in the order of floats. NaN comes last.
ATAT_FAST_INLINE uint32_t ordered(float value) {
  if (value != value) return UINT32_MAX;
  const uint32_t bits = bits_of_float(value);
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

// Small keys are hidden first. Without a tilt the key is the word itself, so nothing is rounded.
ATAT_FAST_INLINE uint32_t tilted_key(uint32_t word, float score, float tilt) { return ordered(gumbel(word) - tilt * score); }

// How one sequence's hidden tokens are spread. Positions turned by `turn` fall into `cells` cells of nearly equal length, and one of
// each is drawn. Keys have a first bit that is 0 for drawn positions, so that these are the smallest.
struct Spread {
  bool chosen, span;
  int64_t turn, cells, length;

  ATAT_FAST_INLINE Spread(const MaskArguments& a, uint64_t first, uint64_t seed, uint32_t step, int64_t count)
      : chosen(a.spread != 0 && count > 0), span(a.spread < 0), turn(0), cells(count), length(a.length) {
    if (!chosen) return;
    const PhiloxWords words = random_words(first, seed, step, kStreamSpread);
    chosen = static_cast<int64_t>(words.word[1]) < (span ? -a.spread : a.spread);
    turn = static_cast<int64_t>((static_cast<uint64_t>(words.word[2]) * static_cast<uint64_t>(length)) >> 32);
  }

  // A key whose position is not drawn, as all are at first; and what becomes of the key of a drawn position.
  static ATAT_FAST_INLINE uint32_t passed_over(uint32_t word) { return word >> 1 | 0x80000000u; }
  static ATAT_FAST_INLINE uint32_t drawn(uint32_t key) { return key & 0x7FFFFFFFu; }

  // The position that is drawn from a cell.
  ATAT_FAST_INLINE int64_t position(int64_t cell, uint64_t first, uint64_t seed, uint32_t step) const {
    int64_t place = cell;
    if (!span) {
      const int64_t begin = (cell * length + cells - 1) / cells, end = ((cell + 1) * length + cells - 1) / cells;
      const uint64_t word = random_words(first + static_cast<uint64_t>(cell), seed, step, kStreamSpread).word[0];
      place = begin + static_cast<int64_t>((word * static_cast<uint64_t>(end - begin)) >> 32);
    }
    return place < turn ? place - turn + length : place - turn;
  }
};

// Hidden are keys under `key`, and the first `ties` positions whose key is `key`.
struct Threshold {
  uint32_t key;
  int32_t ties;
};

ATAT_FAST_INLINE Threshold hide_none() { return {0, 0}; }
ATAT_FAST_INLINE Threshold hide_all() { return {UINT32_MAX, INT_MAX}; }

constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;

// The bin that holds the rank-th smallest (from 1), its rank inside that bin, and how many the bin holds.
struct Found {
  uint32_t digit;
  int32_t rank;
  int32_t count;
};

ATAT_FAST_INLINE Found find_bin(const int32_t* histogram, int bins, int32_t rank) {
  int digit = 0;
  while (digit < bins - 1 && histogram[digit] < rank) rank -= histogram[digit++];
  return {static_cast<uint32_t>(digit), rank, histogram[digit]};
}

// Radix select from the top digit down. In each pass the caller counts the digits of the keys still in play, and `narrow` keeps
// the bin that holds the rank-th smallest. Random keys end after two or three of the four passes, when one bin goes in whole.
struct RadixSelect {
  int32_t rank;
  uint32_t prefix = 0;
  uint32_t fixed = 0;
  int shift = 32 - kDigitBits;
  bool done = false;
  Threshold threshold = {0, 0};

  ATAT_FAST_INLINE explicit RadixSelect(int32_t wanted) : rank(wanted) {}

  ATAT_FAST_INLINE bool in_play(uint32_t key) const { return ((key ^ prefix) & fixed) == 0; }
  ATAT_FAST_INLINE uint32_t digit(uint32_t key) const { return (key >> shift) & (kBins - 1); }

  ATAT_FAST_INLINE void narrow(Found found) {
    prefix |= found.digit << shift;
    fixed |= static_cast<uint32_t>(kBins - 1) << shift;
    rank = found.rank;
    if (found.count == rank) {
      threshold = {prefix | ~fixed, INT_MAX};
      done = true;
    } else if (shift == 0) {
      threshold = {prefix, rank};
      done = true;
    }
    shift -= kDigitBits;
  }
};

// The serial form, for one sequence. may_hide is null if every token may be hidden; 0 < wanted < how many may be.
inline Threshold select_threshold(const uint32_t* keys, const uint8_t* may_hide, int64_t length, int32_t wanted) {
  RadixSelect select(wanted);
  while (!select.done) {
    int32_t histogram[kBins] = {};
    for (int64_t i = 0; i < length; ++i) {
      histogram[select.digit(keys[i])] += select.in_play(keys[i]) && (may_hide == nullptr || may_hide[i]);
    }
    select.narrow(find_bin(histogram, kBins, select.rank));
  }
  return select.threshold;
}

// A count as given, clamped to what a sequence can hold, so that no data leads a loop out of its buffers.
ATAT_FAST_INLINE int32_t clamp_count(int64_t count, int64_t limit) {
  return static_cast<int32_t>(count < 0 ? 0 : count > limit ? limit : count);
}

// The exponent whose softmax over hidden tokens shapes the weights `order` and `importance`.
ATAT_FAST_INLINE float weight_exponent(int weighting, float score, float tilt, float focus) {
  return (weighting == kOrder ? -tilt : focus) * score;
}

}  // namespace atat_fast
