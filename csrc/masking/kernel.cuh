// The CUDA kernel of mask_tokens. One CTA owns one sequence and its keys, in shared memory.
//
// It moves little (ids in and out, 12 bytes a hidden token), so launches and latency bound it. Everything is one launch. Inside
// it the k-th smallest key is found by counting digits (four passes at most, over shared memory), never by sorting. Every CTA
// sums num_masked itself to find its first row, so CTAs never wait for each other, no atomic leaves a CTA, and results
// are the same bits on every run. Threads take tokens in fours: 16 bytes of int32 ids, twice 16 of int64.
//
// This file uses few of CUDA's words, so that tests can also run it on a CPU, thread by thread.
#pragma once

#include "../common/warp.cuh"
#include "rule.h"

namespace atat_fast {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kGroup = 4;  // tokens a thread takes at a time

// The head of the CTA's shared memory. Keys follow, four a group, then one byte a group with a bit for each token.
struct SharedHead {
  int32_t histogram[kBins];
  int32_t partial[kMaxWarps];
  float partial_float[kMaxWarps];
  Found found;
};

ATAT_FAST_INLINE int64_t group_count(int64_t length) { return (length + kGroup - 1) / kGroup; }

inline int64_t shared_bytes(int64_t length) {
  return static_cast<int64_t>(sizeof(SharedHead)) + group_count(length) * (kGroup * sizeof(uint32_t) + 1);
}

inline int thread_count(int64_t length) {
  const int64_t warps = (group_count(length) + 31) / 32;
  return static_cast<int>(32 * (warps < 4 ? 4 : warps > kMaxWarps ? kMaxWarps : warps));
}

// Sum over the CTA, returned to all its threads. Every thread calls it; the order of addition is fixed.
__device__ inline int32_t cta_sum(int32_t value, SharedHead& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  value = __reduce_add_sync(kWholeWarp, value);
  if (lane == 0) shared.partial[warp] = value;
  __syncthreads();
  value = __reduce_add_sync(kWholeWarp, lane < warps ? shared.partial[lane] : 0);
  __syncthreads();
  return value;
}

template <bool kLargest>
__device__ inline float cta_reduce(float value, SharedHead& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const auto across_warp = [](float of_lane) { return kLargest ? warp_max(of_lane) : warp_sum(of_lane); };
  value = across_warp(value);
  if (lane == 0) shared.partial_float[warp] = value;
  __syncthreads();
  value = across_warp(lane < warps ? shared.partial_float[lane] : (kLargest ? -INFINITY : 0.0f));
  __syncthreads();
  return value;
}

// Sum over the threads before this one; `total` becomes the sum over all.
__device__ inline int32_t cta_exclusive_sum(int32_t value, SharedHead& shared, int32_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int32_t inclusive = warp_inclusive_sum(value);
  if (lane == 31) shared.partial[warp] = inclusive;
  __syncthreads();
  const int32_t of_warp = lane < warps ? shared.partial[lane] : 0;
  const int32_t before = __reduce_add_sync(kWholeWarp, lane < warp ? of_warp : 0);
  total = __reduce_add_sync(kWholeWarp, of_warp);
  __syncthreads();
  return before + inclusive - value;
}

// Four neighbours at `from`, or the first `count` of them if the sequence ends there. Accesses are of 16 bytes (for bytes of 4)
// if the whole tensor is aligned for them.
template <typename T>
__device__ inline void load_group(T (&out)[kGroup], const T* from, int count, bool aligned) {
  struct alignas(sizeof(T) * kGroup < 16 ? sizeof(T) * kGroup : 16) Four {
    T value[kGroup];
  };
  if (aligned) {
    const Four four = *reinterpret_cast<const Four*>(from);
    for (int e = 0; e < kGroup; ++e) out[e] = four.value[e];
  } else {
    for (int e = 0; e < kGroup; ++e) out[e] = e < count ? from[e] : T(0);
  }
}

template <typename T>
__device__ inline void store_group(T* to, const T (&in)[kGroup], int count, bool aligned) {
  struct alignas(sizeof(T) * kGroup < 16 ? sizeof(T) * kGroup : 16) Four {
    T value[kGroup];
  };
  if (aligned) {
    Four four;
    for (int e = 0; e < kGroup; ++e) four.value[e] = in[e];
    *reinterpret_cast<Four*>(to) = four;
  } else {
    for (int e = 0; e < count; ++e) to[e] = in[e];
  }
}

// All of one sequence's work, for one thread.
template <typename Id>
struct MaskSequence {
  const MaskArguments& a;
  const bool aligned;
  SharedHead& shared;
  uint32_t* keys;
  uint8_t* bits;  // of a group: which tokens may be hidden, and from hide() on, which are

  const int64_t b = blockIdx.x;
  const int64_t start = b * a.length;
  const int groups = static_cast<int>(group_count(a.length));
  // Loops over groups take equally many turns in every thread of the CTA, because all threads synchronise inside them.
  const int turns = (groups + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);

  int64_t offset = 0, total = 0;  // where this sequence's rows begin, where all rows end
  int32_t slots = 0;              // rows kept for this sequence: its count clamped to its length
  int32_t wanted = 0;             // tokens to hide: clamped to what may be hidden too
  int32_t may_hide = 0, free = 0;

  __device__ int group_of(int turn) const { return turn * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x); }
  __device__ int tokens_of(int group) const {
    const int64_t left = a.length - static_cast<int64_t>(kGroup) * group;
    return left < 0 ? 0 : left > kGroup ? kGroup : static_cast<int>(left);
  }
  __device__ int64_t at(int group) const { return start + static_cast<int64_t>(kGroup) * group; }

  __device__ void place_rows() {
    int64_t before = 0, all = 0;
    for (int64_t i = threadIdx.x % 32; i < a.batch; i += 32) {  // each warp sums it all: the array is small
      const int32_t count = clamp_count(a.num_masked[i], a.length);
      before += i < b ? count : 0;
      all += count;
    }
    for (int distance = 16; distance > 0; distance /= 2) {
      before += __shfl_xor_sync(kWholeWarp, before, distance);
      all += __shfl_xor_sync(kWholeWarp, all, distance);
    }
    offset = before;
    total = all;
    slots = clamp_count(a.num_masked[b], a.length);
  }

  __device__ void make_keys() {
    const uint64_t seed = static_cast<uint64_t>(*a.seed);
    const uint32_t step = static_cast<uint32_t>(*a.step);
    const uint64_t first = static_cast<uint64_t>(a.sample_ids[b]) * static_cast<uint64_t>(a.length);
    const Spread spread(a, first, seed, step, slots);
    for (int group = threadIdx.x; group < groups; group += blockDim.x) {
      const int count = tokens_of(group);
      uint8_t frozen[kGroup] = {}, eligible[kGroup] = {1, 1, 1, 1};
      float scores[kGroup] = {};
      if (a.frozen != nullptr) load_group(frozen, a.frozen + at(group), count, aligned);
      if (a.eligible != nullptr) load_group(eligible, a.eligible + at(group), count, aligned);
      if (a.tilted()) load_group(scores, a.scores + at(group), count, aligned);
      uint8_t may = 0;
      for (int e = 0; e < kGroup; ++e) {
        if (e >= count) break;
        uint32_t key = random_words(first + static_cast<uint64_t>(kGroup * group + e), seed, step, a.stream).word[0];
        if (a.tilted()) key = tilted_key(key, scores[e], a.tilt);
        if (spread.chosen) key = Spread::passed_over(key);
        keys[kGroup * group + e] = key;
        free += !frozen[e];
        may |= static_cast<uint8_t>((!frozen[e] && eligible[e]) << e);
      }
      bits[group] = may;
      may_hide += __popc(may);
    }
    may_hide = cta_sum(may_hide, shared);
    free = cta_sum(free, shared);
    wanted = slots < may_hide ? slots : may_hide;
    if (spread.chosen) {  // the sums above synchronised: all keys are there, and no two cells share one
      for (int64_t cell = threadIdx.x; cell < spread.cells; cell += blockDim.x) {
        uint32_t& key = keys[spread.position(cell, first, seed, step)];
        key = Spread::drawn(key);
      }
      __syncthreads();
    }
  }

  // Adds 1 to a bin for each token in play. Tilted keys fall into few bins, so lanes first agree on one adder for each bin.
  __device__ void count_digits(const RadixSelect& select) {
    for (int turn = 0; turn < turns; ++turn) {
      const int group = group_of(turn);
      for (int e = 0; e < kGroup; ++e) {
        bool in_play = group < groups && (bits[group] >> e & 1);
        const uint32_t key = in_play ? keys[kGroup * group + e] : 0;
        in_play = in_play && select.in_play(key);
        const uint32_t digit = in_play ? select.digit(key) : kBins;
        if (a.tilted()) {
          const uint32_t same = __match_any_sync(kWholeWarp, digit);
          const bool first = (same & ((1u << (threadIdx.x % 32)) - 1)) == 0;
          if (in_play && first) atomicAdd(&shared.histogram[digit], __popc(same));
        } else if (in_play) {
          atomicAdd(&shared.histogram[digit], 1);
        }
      }
    }
  }

  // One warp finds the bin: a lane sums eight bins, the warp adds up, and the lane that holds the rank looks inside its eight.
  __device__ void find(int32_t rank) {
    constexpr int kOfLane = kBins / 32;
    const int lane = threadIdx.x % 32;
    const int32_t* mine = shared.histogram + lane * kOfLane;
    int32_t sum = 0;
    for (int i = 0; i < kOfLane; ++i) sum += mine[i];
    const int32_t until = warp_inclusive_sum(sum);
    if (until - sum < rank && rank <= until) {
      Found found = find_bin(mine, kOfLane, rank - (until - sum));
      found.digit += lane * kOfLane;
      shared.found = found;
    }
  }

  __device__ Threshold find_threshold() {
    if (wanted == 0) return hide_none();
    if (wanted == may_hide) return hide_all();
    RadixSelect select(wanted);
    while (!select.done) {
      for (int i = threadIdx.x; i < kBins; i += blockDim.x) shared.histogram[i] = 0;
      __syncthreads();
      count_digits(select);
      __syncthreads();
      if (threadIdx.x < 32) find(select.rank);
      __syncthreads();
      select.narrow(shared.found);
    }
    return select.threshold;
  }

  // From keys to hidden tokens: `bits` becomes which tokens of a group are hidden, keys[4 group] the row of the first of them.
  // One scan adds up both counts, of keys under the threshold and of keys at it, 16 bits each.
  __device__ void hide(Threshold threshold) {
    int32_t under_before = 0, ties_before = 0;
    for (int turn = 0; turn < turns; ++turn) {
      const int group = group_of(turn);
      const uint32_t may = group < groups ? bits[group] : 0;
      uint32_t under = 0, tie = 0;
      for (int e = 0; e < kGroup; ++e) {
        if (!(may >> e & 1)) continue;
        const uint32_t key = keys[kGroup * group + e];
        under |= static_cast<uint32_t>(key < threshold.key) << e;
        tie |= static_cast<uint32_t>(key == threshold.key) << e;
      }
      int32_t sums = 0;
      const int32_t packed = cta_exclusive_sum(__popc(under) | __popc(tie) << 16, shared, sums);
      int32_t ties = ties_before + (packed >> 16);
      const int32_t row = under_before + (packed & 0xFFFF) + (ties < threshold.ties ? ties : threshold.ties);
      under_before += sums & 0xFFFF;
      ties_before += sums >> 16;
      for (int e = 0; e < kGroup; ++e) {
        if (tie >> e & 1) under |= static_cast<uint32_t>(ties++ < threshold.ties) << e;
      }
      if (group < groups) {
        bits[group] = static_cast<uint8_t>(under);
        keys[kGroup * group] = static_cast<uint32_t>(row);
      }
    }
  }

  // Softmax over hidden tokens: the largest exponent and the sum. Each thread reads back what it wrote in hide().
  __device__ void softmax(float& largest, float& sum) {
    const auto each = [&](auto&& visit) {
      for (int group = threadIdx.x; group < groups; group += blockDim.x) {
        float scores[kGroup];
        load_group(scores, a.scores + at(group), tokens_of(group), aligned);
        for (int e = 0; e < kGroup; ++e) {
          if (bits[group] >> e & 1) visit(weight_exponent(a.weighting, scores[e], a.tilt, a.focus));
        }
      }
    };
    largest = -INFINITY;
    each([&](float exponent) { largest = fmaxf(largest, exponent); });
    largest = cta_reduce<true>(largest, shared);
    sum = 0;
    each([&](float exponent) { sum += expf(exponent - largest); });
    sum = cta_reduce<false>(sum, shared);
  }

  // The plain mean's weight. Every CTA counts the whole batch's frozen tokens: their bytes are in the second-level cache.
  __device__ float ce_weight() {
    const int64_t tokens = a.batch * a.length;
    int32_t frozen = 0;
    if (a.frozen != nullptr) {
      const int64_t whole = aligned ? tokens / 16 : 0;
      for (int64_t i = threadIdx.x; i < whole; i += blockDim.x) {
        const uint4 sixteen = reinterpret_cast<const uint4*>(a.frozen)[i];
        frozen += __popc(sixteen.x) + __popc(sixteen.y) + __popc(sixteen.z) + __popc(sixteen.w);
      }
      for (int64_t i = 16 * whole + threadIdx.x; i < tokens; i += blockDim.x) frozen += a.frozen[i];
      frozen = cta_sum(frozen, shared);
    }
    return static_cast<float>(tokens - frozen) / static_cast<float>(total > 0 ? total : 1);
  }

  __device__ void write(float weight, float largest) {
    const bool softmaxed = a.weighting == kOrder || a.weighting == kImportance;
    for (int group = threadIdx.x; group < groups; group += blockDim.x) {
      const int count = tokens_of(group);
      const uint32_t hidden = bits[group];
      Id ids[kGroup];
      float scores[kGroup] = {};
      load_group(ids, static_cast<const Id*>(a.tokens) + at(group), count, aligned);
      if (softmaxed) load_group(scores, a.scores + at(group), count, aligned);
      int64_t row = offset + keys[kGroup * group];
      for (int e = 0; e < kGroup; ++e) {
        if (!(hidden >> e & 1)) continue;
        ids[e] = static_cast<Id>(a.mask_id);
        if (row < a.num_rows) {
          const float factor = softmaxed ? expf(weight_exponent(a.weighting, scores[e], a.tilt, a.focus) - largest) : 1.0f;
          a.rows[row] = at(group) + e;
          a.weights[row] = weight * factor;
        }
        ++row;
      }
      store_group(static_cast<Id*>(a.noisy) + at(group), ids, count, aligned);
    }
  }

  __device__ void pad(int64_t from, int64_t until, int64_t stride) {
    for (int64_t row = from; row < until && row < a.num_rows; row += stride) {
      a.rows[row] = 0;
      a.weights[row] = 0;
    }
  }

  __device__ void run() {
    place_rows();
    make_keys();
    hide(find_threshold());
    float largest = 0, weight = static_cast<float>(free + 1) / static_cast<float>(wanted > 0 ? wanted : 1);
    if (a.weighting == kCrossEntropy) {
      weight = ce_weight();
    } else if (a.weighting != kUniform) {
      float sum = 0;
      softmax(largest, sum);
      weight = static_cast<float>(free + 1) / sum;
    }
    write(weight, largest);
    // Slots that a clamped count left over, then this CTA's share of those after the last row.
    pad(offset + wanted + threadIdx.x, offset + slots, blockDim.x);
    pad(total + b * blockDim.x + threadIdx.x, a.num_rows, static_cast<int64_t>(gridDim.x) * blockDim.x);
  }
};

template <typename Id>
__global__ void __launch_bounds__(kMaxThreads) mask_tokens_kernel(const MaskArguments a, const bool aligned) {
  extern __shared__ uint4 shared_memory[];
  auto& head = *reinterpret_cast<SharedHead*>(shared_memory);
  auto* keys = reinterpret_cast<uint32_t*>(&head + 1);
  auto* bits = reinterpret_cast<uint8_t*>(keys + kGroup * group_count(a.length));
  MaskSequence<Id>{a, aligned, head, keys, bits}.run();
}

}  // namespace atat_fast
