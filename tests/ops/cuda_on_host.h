// Runs a CUDA kernel's source on a CPU, one CTA at a time: each CUDA thread is a fiber, and __syncthreads and the warp's own
// exchanges are the places where fibers wait for each other. Who runs next is drawn at random, or, for odd seeds, by warp in a
// random order of rank, so that one warp runs as far ahead of another as barriers let it: a result which needs a barrier that is
// not there changes with the seed. It knows the few words of CUDA that the kernels in csrc/ use.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __launch_bounds__(threads)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

struct Meeting {
  size_t expected = 0;
  std::vector<int> waiting;
};

struct Cta {
  static constexpr size_t kStack = 64 << 10;
  std::vector<ucontext_t> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<int> ready;
  std::vector<Meeting> warps;
  std::vector<uint64_t> slots;
  Meeting all;
  ucontext_t scheduler;
  std::function<void()> body;
  std::mt19937 order;
  int running = -1;
  size_t finished = 0;
};
inline Cta* cta = nullptr;

[[noreturn]] inline void fail(const char* reason) {
  std::fprintf(stderr, "cuda_on_host: %s\n", reason);
  std::abort();
}

inline void meet(Meeting& meeting) {
  meeting.waiting.push_back(cta->running);
  if (meeting.waiting.size() == meeting.expected) {
    cta->ready.insert(cta->ready.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
  }
  const int self = cta->running;
  swapcontext(&cta->fibers[self], &cta->scheduler);
}

inline void run_fiber() {
  cta->body();
  ++cta->finished;
  setcontext(&cta->scheduler);
}

// Runs `body` as every thread of every CTA of a grid.
inline void launch(unsigned blocks, unsigned threads, unsigned seed, const std::function<void()>& body) {
  if (threads % 32 != 0) fail("a CTA must hold whole warps");
  gridDim.x = blocks;
  blockDim.x = threads;
  for (unsigned b = 0; b < blocks; ++b) {
    Cta now;
    cta = &now;
    now.body = body;
    now.order.seed(seed + b);
    now.fibers.resize(threads);
    now.slots.resize(threads);
    now.warps.resize(threads / 32);
    for (auto& warp : now.warps) warp.expected = 32;
    now.all.expected = threads;
    for (unsigned t = 0; t < threads; ++t) {
      now.stacks.emplace_back(new char[Cta::kStack]);
      getcontext(&now.fibers[t]);
      now.fibers[t].uc_stack.ss_sp = now.stacks[t].get();
      now.fibers[t].uc_stack.ss_size = Cta::kStack;
      now.fibers[t].uc_link = nullptr;
      makecontext(&now.fibers[t], run_fiber, 0);
      now.ready.push_back(static_cast<int>(t));
    }
    blockIdx.x = b;
    std::vector<unsigned> rank(threads / 32);
    for (auto& of_warp : rank) of_warp = seed % 2 ? now.order() : 0;
    while (now.finished < threads) {
      if (now.ready.empty()) fail("threads wait at a barrier that others never reach");
      size_t pick = now.order() % now.ready.size();
      for (size_t i = 0; i < now.ready.size(); ++i) {
        if (rank[now.ready[i] / 32] > rank[now.ready[pick] / 32]) pick = i;
      }
      now.running = now.ready[pick];
      now.ready[pick] = now.ready.back();
      now.ready.pop_back();
      threadIdx.x = static_cast<unsigned>(now.running);
      swapcontext(&now.scheduler, &now.fibers[now.running]);
    }
    cta = nullptr;
  }
}

// What every lane of the warp brought, in lane order.
template <typename T>
std::vector<T> exchange(uint32_t mask, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xFFFFFFFFu) fail("only whole warps exchange values");
  const unsigned self = threadIdx.x, first = self / 32 * 32;
  __builtin_memcpy(&cta->slots[self], &value, sizeof(T));
  meet(cta->warps[self / 32]);
  std::vector<T> lanes(32);
  for (unsigned lane = 0; lane < 32; ++lane) __builtin_memcpy(&lanes[lane], &cta->slots[first + lane], sizeof(T));
  meet(cta->warps[self / 32]);
  return lanes;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::meet(cuda_on_host::cta->all); }

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int distance) {
  return cuda_on_host::exchange(mask, value)[threadIdx.x % 32 ^ distance];
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned distance) {
  const unsigned lane = threadIdx.x % 32;
  return cuda_on_host::exchange(mask, value)[lane < distance ? lane : lane - distance];
}

inline int32_t __reduce_add_sync(uint32_t mask, int32_t value) {
  int32_t sum = 0;
  for (const int32_t lane : cuda_on_host::exchange(mask, value)) sum += lane;
  return sum;
}

inline uint32_t __match_any_sync(uint32_t mask, uint32_t value) {
  const auto lanes = cuda_on_host::exchange(mask, value);
  uint32_t same = 0;
  for (int lane = 0; lane < 32; ++lane) same |= static_cast<uint32_t>(lanes[lane] == value) << lane;
  return same;
}

inline int __popc(uint32_t value) { return __builtin_popcount(value); }

inline int32_t atomicAdd(int32_t* at, int32_t value) {
  const int32_t before = *at;
  *at += value;
  return before;
}
