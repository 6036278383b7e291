// The rules of linear_categorical: the place of an id of the vocabulary in the random stream, and which id wins.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/philox.h"

namespace atat_fast {

// docs/philox.md: ids 2 p and 2 p + 1 of the vocabulary share part p of the stream; the first takes words 0 and 1, the second 2
// and 3.
constexpr uint32_t kTokenStream = 5;

ATAT_FAST_INLINE uint32_t token_stream(uint32_t part) { return kTokenStream + (part << 8); }

// The best of some ids so far: its score, z / temperature + Gumbel, and its id. A score that is NaN wins for good, with id -1.
struct Winner {
  float score;
  int64_t id;
};

ATAT_FAST_INLINE Winner nobody() { return {-INFINITY, -1}; }

// Of two ids the higher score wins, and of equals the first.
ATAT_FAST_INLINE Winner better(Winner a, Winner b) {
  if (a.score != a.score) return a;
  return (b.score != b.score || b.score > a.score) ? b : a;
}

}  // namespace atat_fast
