// The kernels of csrc/cross_entropy/kernel.cuh, run on a CPU for tests/ops/linear_cross_entropy/test_cuda_on_host.py.

#include "../cuda_on_host.h"

#include "../../../csrc/cross_entropy/kernel.cuh"

#include <cstring>

namespace atat_fast {
uint4 shared_memory[(232448 + 16) / 16];  // what `extern __shared__` names: all an sm_90 has, and a line that nobody may touch
}

namespace {

using namespace atat_fast;

// Runs `kernel` with so much shared memory, and says whether it left the rest alone.
template <typename Kernel>
bool launch_with(int64_t bytes, int64_t blocks, int threads, unsigned seed, const Kernel& kernel) {
  auto* shared = reinterpret_cast<unsigned char*>(shared_memory);
  std::memset(shared, 0xA5, sizeof(shared_memory));  // whatever an earlier kernel left
  cuda_on_host::launch(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), seed, kernel);
  for (size_t i = bytes; i < sizeof(shared_memory); ++i) {
    if (shared[i] != 0xA5) return false;
  }
  return true;
}

template <typename T, bool kRates>
bool run(const RowArguments& a, bool aligned, bool kept, int threads, float* partial, unsigned seed) {
  const bool rows = launch_with(row_bytes<T>(a.columns, kept, kRates), a.rows, threads, seed, [&] {
    if (kept) {
      cross_entropy_kernel<T, true, kRates>(a, aligned);
    } else {
      cross_entropy_kernel<T, false, kRates>(a, aligned);
    }
  });
  if (!a.gradient || a.bias_gradient == nullptr) return rows;
  const int64_t splits = split_count<T>(a.rows, a.columns), strips = (a.columns + kStrip<T> - 1) / kStrip<T>;
  float* const to = splits > 1 ? partial : nullptr;
  const bool sums = launch_with(kSumShared, strips * splits, kSumThreads, seed, [&] { column_sum_kernel<T>(a, aligned, to); });
  if (to == nullptr) return rows && sums;
  const int64_t blocks = (a.columns + kSumThreads - 1) / kSumThreads;
  return rows && sums && launch_with(0, blocks, kSumThreads, seed, [&] {
           add_column_sums_kernel(a.bias_gradient, to, splits, a.columns);
         });
}

}  // namespace

extern "C" {

int64_t bytes_of_row(int64_t columns, int half, int rates) {
  return half ? row_bytes<uint16_t>(columns, true, rates) : row_bytes<float>(columns, true, rates);
}

int64_t threads_of_kept_row(int64_t columns, int half, int64_t of_multiprocessor) {
  const int most = kept_row_threads(bytes_of_row(columns, half, 0), of_multiprocessor);
  return half ? row_threads<uint16_t>(columns, most) : row_threads<float>(columns, most);
}

int64_t splits_of(int64_t rows, int64_t columns, int half) {
  return half ? split_count<uint16_t>(rows, columns) : split_count<float>(rows, columns);
}

int64_t argument_bytes() { return sizeof(RowArguments); }

// Returns 1 when a kernel wrote past the shared memory it asked for. `partial` is what the launch takes from torch.
int run_cross_entropy(const RowArguments* arguments, int aligned, int kept, int threads, float* partial, unsigned seed) {
  const RowArguments& a = *arguments;
  const auto plain = a.half ? &run<uint16_t, false> : &run<float, false>;
  const auto rated = a.half ? &run<uint16_t, true> : &run<float, true>;
  const auto run_as = a.rates == nullptr ? plain : rated;
  return !run_as(a, aligned, kept, threads, partial, seed);
}

void round_to_bfloat16(const float* values, int64_t count, uint16_t* one, uint32_t* pairs) {
  for (int64_t k = 0; k < count; ++k) one[k] = to_bfloat16(values[k]);
  for (int64_t k = 0; k + 1 < count; k += 2) pairs[k / 2] = to_bfloat16_pair(values[k], values[k + 1]);
}
}
