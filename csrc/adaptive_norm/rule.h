// Arguments of adaptive_layer_norm and gated_residual_norm, the cut of their rows into tasks, and which elements dropout drops.
// Plain C++.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../common/philox.h"

namespace atat_fast {

// A tensor of fp32 or bf16.
struct Values {
  const void* data = nullptr;  // null: not given
  bool half = false;           // bf16
};

// Conditioning: row b is sample b's, `stride` elements after the one before. If one row serves all, stride is 0.
struct Conditioning {
  Values values;
  int64_t stride = 0;
};

// Elements whose random word is at most `largest_dropped` become 0, and the others are multiplied by `scale`.
struct Dropout {
  bool on = false;
  uint32_t largest_dropped = 0;
  float scale = 1;
  const int64_t* sample_ids = nullptr;  // [batch]
  uint64_t seed = 0;
  uint32_t step = 0, stream = 0;
};

// The nearest whole number to chance * 2^32 of the 2^32 words is dropped: for a chance below 2^-33, none.
inline void set_chance(Dropout& dropout, double chance) {
  const double dropped = std::nearbyint(chance * 4294967296.0);
  dropout.on = dropped >= 1;
  dropout.largest_dropped = dropout.on ? static_cast<uint32_t>(dropped - 1) : 0;
  dropout.scale = 1.0f / static_cast<float>(1.0 - chance);
}

// Four neighbouring elements of a row share one counter; this is the first of sample `id`'s row at `position`.
inline uint64_t first_counter(int64_t id, int64_t position, int64_t length, int64_t width) {
  const auto groups = static_cast<uint64_t>((width + 3) / 4);
  return (static_cast<uint64_t>(id) * static_cast<uint64_t>(length) + static_cast<uint64_t>(position)) * groups;
}

// Arguments that forward and backward share. Tensors of [batch, length, width] are contiguous.
struct NormArguments {
  bool gated;           // gated_residual_norm; else there is no branch, no gate, no dropout and no total
  int64_t batch, length, width;
  int64_t groups;       // rows of conditioning: 1 or batch
  Values stream;        // forward: the residual; backward: the sum that was normalised, in the stream's dtype
  Values branch;        // [batch, length, width]
  Conditioning gate, shift, scale;
  Values weight;        // [width], null for ones
  Dropout dropout;
  float* mean;          // [batch, length]; the backward reads them
  float* rstd;
};

struct ForwardArguments : NormArguments {
  float eps;
  void* total;          // as stream
  void* y;              // [batch, length, width]
  bool half_y;
};

struct BackwardArguments : NormArguments {
  Values dy, dtotal;    // null for zeros; dtotal is as stream
  void* dstream;        // as stream
  void* dbranch;        // as branch
  void *dgate, *dshift, *dscale, *dweight;  // [groups, width] and [width]
  bool half_dgate, half_dshift, half_dscale, half_dweight;
};

// Rows in tasks. All rows of a task share their conditioning. Tasks depend on shapes alone, so any number of threads adds up a
// sum over rows in the same order.
struct Tasks {
  int64_t rows;    // of a group
  int64_t splits;  // tasks of a group
  int64_t count;

  int64_t group(int64_t task) const { return task / splits; }
  int64_t begin(int64_t task) const { return group(task) * rows + rows * (task % splits) / splits; }
  int64_t end(int64_t task) const { return group(task) * rows + rows * (task % splits + 1) / splits; }
};

// A task's sums are written and read once more: with sixteen rows a task that is a sixteenth of the bytes of the rows.
constexpr int64_t kRowsPerTask = 16;
constexpr int64_t kMostTasks = 256;

inline Tasks cut(int64_t batch, int64_t length, int64_t groups) {
  const int64_t rows = groups == 1 ? batch * length : length;
  const int64_t wanted = (rows + kRowsPerTask - 1) / kRowsPerTask;
  const int64_t splits = std::max<int64_t>(1, std::min(wanted, kMostTasks / std::max<int64_t>(1, groups)));
  return {rows, splits, groups * splits};
}

}  // namespace atat_fast
