// The CUDA kernels of linear_cross_entropy's row pass. One CTA owns one row of logits and turns it into its gradient in place.
//
// Memory bounds it: a bf16 logit is 4 bytes, read once and written once. An H100 at 3 TB/s could issue 39 instructions in the
// time of one logit; 18 sum it up and 8 make it its gradient. So a row is read from global memory once, and waits in shared
// memory until its sum is known. The sum grows while the row is read, relative to the largest logit so far. A row of 50,304 bf16
// logits takes 101,120 bytes, which fits an sm_89 once and an sm_90 twice (of 30,592 columns: once and three times). A CTA ends
// with its row: while it waits for memory, others on the chip compute, and starting one costs a microsecond of the ten or twenty
// that a row takes. A row too long for shared memory is read a second time for its gradient. For losses alone nothing is kept,
// and a CTA needs little shared memory.
//
// Threads take 16 bytes at a time and write the elements they read themselves; a CTA's threads exchange one sum only. Sums have a
// fixed order, so results are the same bits on every run.
//
// The bias's gradient is the column sums of the slab that was written, in two stages without atomics.
//
// Rates of the vocabulary (kRates) are fp32 and the same for every row. They come from the second-level cache, 4 bytes a logit in
// either pass; a row without rates runs a kernel without that code.
//
// This file uses few of CUDA's words, so that tests can also run it on a CPU, thread by thread.
#pragma once

#include "../common/bfloat16.h"
#include "../common/warp.cuh"
#include "rule.h"

namespace atat_fast {

// 1,024 threads of 64 registers fit a multiprocessor, as one CTA or as four; the launch bound holds a thread to those 64.
constexpr int kMaxRowThreads = 1024;
constexpr int kMinRowThreads = 256;
constexpr int kReadThreads = 512;  // of a CTA that keeps no row
constexpr int kMaxRowWarps = kMaxRowThreads / 32;
constexpr int kAhead = 4;  // 16-byte loads that a thread has in flight

// A warp's share of the row's sum: its part, and its share of the target's logit. It heads a CTA's shared memory; the row
// follows. `rated` is the sum of rate * e^(z - largest) over the others.
template <bool kRates>
struct WarpPart {
  RowPart others;
  float at_target;
};

template <>
struct WarpPart<true> {
  RowPart others;
  float at_target;
  float rated;
};

ATAT_FAST_INLINE void move_to(WarpPart<false>& part, float largest) { part.others = rebase(part.others, largest); }

ATAT_FAST_INLINE void move_to(WarpPart<true>& part, float largest) {
  const float shift = part.others.largest - largest;
  if (part.others.sum != 0 && shift != 0) part.rated *= expf(shift);
  part.others = rebase(part.others, largest);
}

// Elements in sixteen bytes of a row, the unit of all accesses.
template <typename T>
constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));

template <typename T>
ATAT_FAST_INLINE int64_t chunk_count(int64_t columns) {
  return (columns + kPerChunk<T> - 1) / kPerChunk<T>;
}

template <bool kRates>
constexpr int kHeadBytes = static_cast<int>(sizeof(WarpPart<kRates>)) * kMaxRowWarps;

// Shared memory of a CTA that keeps its row (kept) or only sums up.
template <typename T>
int64_t row_bytes(int64_t columns, bool kept, bool rates) {
  return (rates ? kHeadBytes<true> : kHeadBytes<false>) + (kept ? 16 * chunk_count<T>(columns) : 0);
}

// Threads of a CTA that keeps its row: together, the CTAs that fit a multiprocessor have about 1,024.
inline int kept_row_threads(int64_t bytes, int64_t shared_of_multiprocessor) {
  const int64_t reserved = 1024;  // the system's own, in every CTA
  const int64_t ctas = shared_of_multiprocessor / (bytes + reserved);
  const int64_t threads = kMaxRowThreads / (ctas < 1 ? 1 : ctas) / 32 * 32;
  return static_cast<int>(threads < kMinRowThreads ? kMinRowThreads : threads);
}

// At most as many threads as there is work for, in whole warps.
template <typename T>
int row_threads(int64_t columns, int most) {
  const int64_t threads = (chunk_count<T>(columns) + 31) / 32 * 32;
  return static_cast<int>(threads < kMinRowThreads ? kMinRowThreads : threads > most ? most : threads);
}

ATAT_FAST_INLINE void widen_chunk(const uint4& chunk, float (&z)[4]) {
  z[0] = float_from_bits(chunk.x), z[1] = float_from_bits(chunk.y);
  z[2] = float_from_bits(chunk.z), z[3] = float_from_bits(chunk.w);
}

ATAT_FAST_INLINE void widen_chunk(const uint4& chunk, float (&z)[8]) {
  z[0] = float_from_bits(chunk.x << 16), z[1] = float_from_bits(chunk.x & 0xFFFF0000u);
  z[2] = float_from_bits(chunk.y << 16), z[3] = float_from_bits(chunk.y & 0xFFFF0000u);
  z[4] = float_from_bits(chunk.z << 16), z[5] = float_from_bits(chunk.z & 0xFFFF0000u);
  z[6] = float_from_bits(chunk.w << 16), z[7] = float_from_bits(chunk.w & 0xFFFF0000u);
}

ATAT_FAST_INLINE uint4 narrow_chunk(const float (&z)[4]) {
  return {bits_of_float(z[0]), bits_of_float(z[1]), bits_of_float(z[2]), bits_of_float(z[3])};
}

ATAT_FAST_INLINE uint4 narrow_chunk(const float (&z)[8]) {
  return {to_bfloat16_pair(z[0], z[1]), to_bfloat16_pair(z[2], z[3]), to_bfloat16_pair(z[4], z[5]), to_bfloat16_pair(z[6], z[7])};
}

// A row of logits in chunks. The first `whole` lie at multiples of 16 bytes; the others go element by element. Those are the end
// of a row, or all of a row that is not `aligned`.
template <typename T>
struct ChunkedRow {
  T* row;
  int64_t columns;
  int whole, chunks;

  __device__ ChunkedRow(const RowArguments& a, int64_t i, bool aligned)
      : row(static_cast<T*>(a.logits) + i * a.stride),
        columns(a.columns),
        whole(aligned ? static_cast<int>(columns / kPerChunk<T>) : 0),
        chunks(static_cast<int>(chunk_count<T>(columns))) {}

  __device__ uint4 load(int chunk) const { return reinterpret_cast<const uint4*>(row)[chunk]; }
  __device__ void store(int chunk, const uint4& value) const { reinterpret_cast<uint4*>(row)[chunk] = value; }

  // -inf beyond the last column: no probability.
  __device__ uint4 load_elements(int chunk) const {
    float z[kPerChunk<T>];
    for (int e = 0; e < kPerChunk<T>; ++e) {
      const int64_t j = static_cast<int64_t>(chunk) * kPerChunk<T> + e;
      z[e] = j < columns ? widened(row[j]) : -INFINITY;
    }
    return narrow_chunk(z);
  }

  __device__ void store_elements(int chunk, const uint4& value) const {
    float z[kPerChunk<T>];
    widen_chunk(value, z);
    for (int e = 0; e < kPerChunk<T>; ++e) {
      const int64_t j = static_cast<int64_t>(chunk) * kPerChunk<T> + e;
      if (j < columns) narrow(row[j], z[e]);
    }
  }
};

// The exponential of a gradient's element. For bf16 it is the device's own power of two: the rounding to bf16 hides its error of
// 2^-22 times the exponent, and its 0 for results under 2^-126.
template <typename T>
__device__ inline float gradient_exp(float x) {
#ifdef __CUDA_ARCH__
  if (sizeof(T) == 2) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504f));
    return power;
  }
#endif
  return expf(x);
}

__device__ inline void add_rated(WarpPart<false>&, int) {}
__device__ inline void add_rated(WarpPart<true>& part, int distance) {
  part.rated += __shfl_xor_sync(kWholeWarp, part.rated, distance);
}

template <bool kRates>
__device__ inline WarpPart<kRates> merge_warp(WarpPart<kRates> part) {
  move_to(part, warp_max(part.others.largest));
  for (int distance = 16; distance > 0; distance /= 2) {
    part.others.sum += __shfl_xor_sync(kWholeWarp, part.others.sum, distance);
    part.others.moment += __shfl_xor_sync(kWholeWarp, part.others.moment, distance);
    part.at_target += __shfl_xor_sync(kWholeWarp, part.at_target, distance);
    add_rated(part, distance);
  }
  return part;
}

template <bool kRates>
__device__ inline WarpPart<kRates> no_part() {
  WarpPart<kRates> part{};
  part.others = no_logits();
  return part;
}

// The whole CTA's share, returned to all its threads. All of them call it, once.
template <bool kRates>
__device__ inline WarpPart<kRates> merge_cta(WarpPart<kRates> part, WarpPart<kRates>* of_warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  part = merge_warp(part);
  if (lane == 0) of_warps[warp] = part;
  __syncthreads();
  return merge_warp(lane < warps ? of_warps[lane] : no_part<kRates>());
}

// The whole of one row's work, seen from one thread. kKept: the row stays in shared memory.
template <typename T, bool kKept, bool kRates>
struct CrossEntropyRow {
  static constexpr int kLoads = kRates ? kAhead / 2 : kAhead;  // rates take registers too
  static_assert(kHeadBytes<kRates> % 16 == 0, "the row is kept at a multiple of 16 bytes");
  using Part = WarpPart<kRates>;

  const RowArguments& a;
  Part* of_warps;
  uint4* kept;

  const int64_t i;
  const ChunkedRow<T> logits;
  const int64_t target;
  const bool inside;
  const float elapsed;

  __device__ CrossEntropyRow(const RowArguments& arguments, bool aligned, uint4* shared)
      : a(arguments),
        of_warps(reinterpret_cast<Part*>(shared)),
        kept(shared + kHeadBytes<kRates> / 16),
        i(blockIdx.x),
        logits(a, i, aligned),
        target(a.target[i]),
        inside(target >= 0 && target < a.vocabulary),
        elapsed(kRates && a.elapsed != nullptr ? a.elapsed[i] : 0.0f) {}

  // Rates of a chunk's columns; 0 beyond the last one.
  __device__ void load_rates(int chunk, float (&rate)[kPerChunk<T>]) const {
    if (chunk < logits.whole) {
      for (int q = 0; q < kPerChunk<T> / 4; ++q) {
        const uint4 four = reinterpret_cast<const uint4*>(a.rates)[static_cast<int64_t>(chunk) * (kPerChunk<T> / 4) + q];
        rate[4 * q] = float_from_bits(four.x), rate[4 * q + 1] = float_from_bits(four.y);
        rate[4 * q + 2] = float_from_bits(four.z), rate[4 * q + 3] = float_from_bits(four.w);
      }
    } else {
      for (int e = 0; e < kPerChunk<T>; ++e) {
        const int64_t j = static_cast<int64_t>(chunk) * kPerChunk<T> + e;
        rate[e] = j < a.columns ? a.rates[j] : 0.0f;
      }
    }
  }

  // Which element of a chunk the target is, or -1.
  __device__ int place_of_target(int chunk) const {
    return inside && target / kPerChunk<T> == chunk ? static_cast<int>(target % kPerChunk<T>) : -1;
  }

  // A thread's share of the row: the others' part, and the target's stored logit if it came by.
  __device__ Part sum_up() const {
    Part part = no_part<kRates>();
    const int stride = blockDim.x;
    for (int first = threadIdx.x; first < logits.whole; first += kLoads * stride) {
      uint4 ahead[kLoads];
      for (int u = 0; u < kLoads; ++u) {
        if (first + u * stride < logits.whole) ahead[u] = logits.load(first + u * stride);
      }
      for (int u = 0; u < kLoads; ++u) {
        if (first + u * stride < logits.whole) add(part, first + u * stride, ahead[u]);
      }
    }
    for (int chunk = logits.whole + threadIdx.x; chunk < logits.chunks; chunk += stride) {
      add(part, chunk, logits.load_elements(chunk));
    }
    return part;
  }

  __device__ void add(Part& part, int chunk, const uint4& value) const {
    if (kKept) kept[chunk] = value;
    float z[kPerChunk<T>];
    widen_chunk(value, z);
    float rate[kPerChunk<T>];
    if constexpr (kRates) {
      load_rates(chunk, rate);
      for (int e = 0; e < kPerChunk<T>; ++e) z[e] -= elapsed * rate[e];
    }
    const int place = place_of_target(chunk);
    if (place >= 0) {
      for (int e = 0; e < kPerChunk<T>; ++e) {
        part.at_target = e == place && a.hidden == nullptr ? z[e] : part.at_target;
        z[e] = e == place ? -INFINITY : z[e];
      }
    }
    float largest = z[0];
    for (int e = 1; e < kPerChunk<T>; ++e) largest = fmaxf(largest, z[e]);  // passes over NaN
    if (largest > part.others.largest) move_to(part, largest);
    const float base = part.others.largest == -INFINITY ? 0.0f : part.others.largest;
    for (int e = 0; e < kPerChunk<T>; ++e) {
      const float x = z[e] - base, power = expf(x);
      part.others.sum += power;
      part.others.moment += power * fmaxf(x, -1e4f);  // 0 where x is -inf
      if constexpr (kRates) part.rated += power * rate[e];
    }
  }

  // A thread's share of hidden . weight[target] + bias[target] - elapsed * rates[target].
  __device__ float recomputed() const {
    float share = 0;
    if (a.bias != nullptr && threadIdx.x == 0) share = widened(static_cast<const T*>(a.bias)[target]);
    if (kRates && threadIdx.x == 0) share -= elapsed * a.rates[target];
    const T* hidden = static_cast<const T*>(a.hidden) + i * a.width;
    const T* weight = static_cast<const T*>(a.weight) + target * a.width;
    for (int64_t k = threadIdx.x; k < a.width; k += blockDim.x) share += widened(hidden[k]) * widened(weight[k]);
    return share;
  }

  __device__ void write_gradient(const RowResult& result, float speed) const {
    for (int chunk = threadIdx.x; chunk < logits.whole; chunk += blockDim.x) {
      logits.store(chunk, gradient_of(result, speed, chunk, kKept ? kept[chunk] : logits.load(chunk)));
    }
    for (int chunk = logits.whole + threadIdx.x; chunk < logits.chunks; chunk += blockDim.x) {
      logits.store_elements(chunk, gradient_of(result, speed, chunk, kKept ? kept[chunk] : logits.load_elements(chunk)));
    }
  }

  __device__ uint4 gradient_of(const RowResult& result, float speed, int chunk, const uint4& value) const {
    float z[kPerChunk<T>];
    widen_chunk(value, z);
    if constexpr (kRates) {
      float rate[kPerChunk<T>];
      load_rates(chunk, rate);
      for (int e = 0; e < kPerChunk<T>; ++e) {
        z[e] = result.scale * gradient_exp<T>((z[e] - elapsed * rate[e]) - result.largest) * (rate[e] - speed);
      }
    } else {
      for (int e = 0; e < kPerChunk<T>; ++e) z[e] = result.scale * gradient_exp<T>(z[e] - result.largest);
    }
    const int place = place_of_target(chunk);
    if (place >= 0) {
      for (int e = 0; e < kPerChunk<T>; ++e) z[e] = e == place ? result.at_target : z[e];
    }
    return narrow_chunk(z);
  }

  __device__ void write_zeros() const {
    const uint4 zeros{0, 0, 0, 0};
    for (int chunk = threadIdx.x; chunk < logits.whole; chunk += blockDim.x) logits.store(chunk, zeros);
    for (int chunk = logits.whole + threadIdx.x; chunk < logits.chunks; chunk += blockDim.x) logits.store_elements(chunk, zeros);
  }

  __device__ void write_row(const RowResult& result) const {
    if (threadIdx.x == 0) report(a, i, result);
  }

  __device__ void write_velocity(float velocity) const {
    if (kRates && threadIdx.x == 0) a.velocity[i] = velocity;
  }

  __device__ void run() const {
    const float weight = a.token_weight == nullptr ? 1.0f : a.token_weight[i];
    if (weight == 0) {  // the same in all threads
      write_row(RowResult{});
      write_velocity(0);
      if (a.gradient) write_zeros();
      return;
    }
    Part part = sum_up();
    if (inside && a.hidden != nullptr) part.at_target = recomputed();
    part = merge_cta(part, of_warps);
    RowResult result = finish(part.others, inside ? part.at_target : -INFINITY, weight);
    if (!inside) result.nll = NAN;
    write_row(result);
    float speed = 0;
    if constexpr (kRates) {
      const float of_others = part.others.sum == 0 ? 0 : part.rated * expf(part.others.largest - result.largest);
      const RateResult rates = finish_rates(result, of_others * result.max_probability, inside ? a.rates[target] : 0.0f, weight);
      write_velocity(inside ? rates.speed : NAN);
      result.at_target = rates.at_target;
      speed = rates.speed;
    }
    if (a.gradient) write_gradient(result, speed);
  }
};

template <typename T, bool kKept, bool kRates>
__global__ void __launch_bounds__(kMaxRowThreads) cross_entropy_kernel(const RowArguments a, const bool aligned) {
  extern __shared__ uint4 shared_memory[];
  CrossEntropyRow<T, kKept, kRates>(a, aligned, shared_memory).run();
}

// Column sums, first stage. A warp reads 512 bytes of a row, then of another, and keeps its sums in registers; a CTA's eight
// warps share a strip of columns and a range of rows (`split`), and write one line of partial sums. With one split that line is
// the result. The slab is read once; partial sums are a few lines of it.
constexpr int kSumThreads = 256;
constexpr int kSumWarps = kSumThreads / 32;
constexpr int kSumShared = kSumWarps * 32 * 16 / 2 * 4;  // as many fp32 as a strip has bf16 columns, for each warp

template <typename T>
constexpr int kStrip = 32 * kPerChunk<T>;

// Splits of the rows: enough CTAs to fill any GPU, with at least 8 rows for every warp. It depends on shapes alone, and so do the
// bits of the result.
template <typename T>
int64_t split_count(int64_t rows, int64_t columns) {
  constexpr int64_t kCtas = 1024, kMostSplits = 32, kLeastRows = 8 * kSumWarps;
  const int64_t strips = (columns + kStrip<T> - 1) / kStrip<T>;
  int64_t splits = (kCtas + strips - 1) / strips;
  const int64_t by_rows = (rows + kLeastRows - 1) / kLeastRows;
  if (splits > by_rows) splits = by_rows;
  return splits < 1 ? 1 : splits > kMostSplits ? kMostSplits : splits;
}

// Partial: [splits, columns], or null if there is one split.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) column_sum_kernel(const RowArguments a, const bool aligned, float* partial) {
  extern __shared__ uint4 shared_memory[];
  auto* of_warps = reinterpret_cast<float*>(shared_memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t strips = (a.columns + kStrip<T> - 1) / kStrip<T>;
  const int64_t strip = blockIdx.x % strips, split = blockIdx.x / strips, splits = gridDim.x / strips;
  const int chunk = static_cast<int>(strip * 32 + lane);
  const int64_t first = a.rows * split / splits, last = a.rows * (split + 1) / splits;

  float sum[kPerChunk<T>] = {};
  const auto add = [&](const uint4& value) {
    float z[kPerChunk<T>];
    widen_chunk(value, z);
    for (int e = 0; e < kPerChunk<T>; ++e) sum[e] += z[e];
  };
  const ChunkedRow<T> top(a, 0, aligned);
  if (chunk < top.whole) {
    for (int64_t r = first + warp; r < last; r += kAhead * kSumWarps) {
      uint4 ahead[kAhead];
      for (int u = 0; u < kAhead; ++u) {
        ahead[u] = uint4{0, 0, 0, 0};
        if (r + u * kSumWarps < last) ahead[u] = ChunkedRow<T>(a, r + u * kSumWarps, aligned).load(chunk);
      }
      for (int u = 0; u < kAhead; ++u) add(ahead[u]);
    }
  } else if (chunk < top.chunks) {
    for (int64_t r = first + warp; r < last; r += kSumWarps) add(ChunkedRow<T>(a, r, aligned).load_elements(chunk));
  }
  for (int e = 0; e < kPerChunk<T>; ++e) of_warps[warp * kStrip<T> + lane * kPerChunk<T> + e] = sum[e];
  __syncthreads();
  const int64_t column = strip * kStrip<T> + threadIdx.x;
  if (threadIdx.x >= kStrip<T> || column >= a.columns) return;
  float total = 0;
  for (int w = 0; w < kSumWarps; ++w) total += of_warps[w * kStrip<T> + threadIdx.x];
  if (partial != nullptr) {
    partial[split * a.columns + column] = total;
  } else {
    a.bias_gradient[column] += total;
  }
}

// Second stage: one thread a column.
__global__ void __launch_bounds__(kSumThreads)
add_column_sums_kernel(float* bias_gradient, const float* partial, int64_t splits, int64_t columns) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  float total = 0;
  for (int64_t split = 0; split < splits; ++split) total += partial[split * columns + column];
  bias_gradient[column] += total;
}

}  // namespace atat_fast
