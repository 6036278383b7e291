// The row pass of linear_cross_entropy on a GPU: launches.

#include "kernel.cuh"

#include "../common/device.h"
#include "op.h"

#include <torch/csrc/stable/accelerator.h>

#include <climits>
#include <mutex>

namespace atat_fast {
namespace {

constexpr int kMostDevices = 64;

void check(cudaError_t status) { check_cuda("cross_entropy_", status); }

// Bytes of shared memory that a CTA may ask for, and that a multiprocessor has.
struct Limits {
  int of_cta, of_multiprocessor;
};

template <typename T, bool kRates>
void allow_shared_memory(int bytes) {
  const auto kernel = cross_entropy_kernel<T, true, kRates>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
}

// Asked once for each device, which is the current one. Kernels that keep their row may then take all of its shared memory.
const Limits& limits_of(int device) {
  static std::once_flag asked[kMostDevices];
  static Limits limits[kMostDevices];
  STD_TORCH_CHECK(device >= 0 && device < kMostDevices, "cross_entropy_ knows ", kMostDevices, " devices, and this is ", device);
  std::call_once(asked[device], [&] {
    Limits& here = limits[device];
    check(cudaDeviceGetAttribute(&here.of_cta, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    check(cudaDeviceGetAttribute(&here.of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
    allow_shared_memory<Half, false>(here.of_cta);
    allow_shared_memory<Half, true>(here.of_cta);
    allow_shared_memory<float, false>(here.of_cta);
    allow_shared_memory<float, true>(here.of_cta);
  });
  return limits[device];
}

template <typename T>
bool rows_are_aligned(const RowArguments& a) {
  return is_aligned(a.logits) && a.stride % kPerChunk<T> == 0;
}

template <typename T, bool kKept, bool kRates>
void launch_rows(const RowArguments& a, int most_threads, cudaStream_t stream) {
  const int threads = row_threads<T>(a.columns, most_threads);
  const auto bytes = static_cast<size_t>(row_bytes<T>(a.columns, kKept, kRates));
  cross_entropy_kernel<T, kKept, kRates><<<static_cast<unsigned>(a.rows), threads, bytes, stream>>>(a, rows_are_aligned<T>(a));
  check(cudaGetLastError());
}

template <typename T>
void sum_columns(const RowArguments& a, const Tensor& logits, cudaStream_t stream) {
  const int64_t splits = split_count<T>(a.rows, a.columns), strips = (a.columns + kStrip<T> - 1) / kStrip<T>;
  Tensor held;
  float* partial = nullptr;
  if (splits > 1) {
    held = torch::stable::new_empty(logits, {splits, a.columns}, ScalarType::Float);
    partial = held.mutable_data_ptr<float>();
  }
  const auto blocks = static_cast<unsigned>(strips * splits);
  column_sum_kernel<T><<<blocks, kSumThreads, kSumShared, stream>>>(a, rows_are_aligned<T>(a), partial);
  check(cudaGetLastError());
  if (partial == nullptr) return;
  const auto all = static_cast<unsigned>((a.columns + kSumThreads - 1) / kSumThreads);
  add_column_sums_kernel<<<all, kSumThreads, 0, stream>>>(a.bias_gradient, partial, splits, a.columns);
  check(cudaGetLastError());
}

template <typename T, bool kRates>
void row_pass(const RowArguments& a, const Tensor& logits) {
  const int device = logits.get_device_index();
  const Limits& limits = limits_of(device);
  const cudaStream_t stream = current_stream(device);
  const int64_t bytes = row_bytes<T>(a.columns, true, kRates);
  if (a.gradient && bytes <= limits.of_cta) {
    launch_rows<T, true, kRates>(a, kept_row_threads(bytes, limits.of_multiprocessor), stream);
  } else {
    launch_rows<T, false, kRates>(a, kReadThreads, stream);
  }
  if (a.gradient && a.bias_gradient != nullptr) sum_columns<T>(a, logits, stream);
}

void cross_entropy_cuda(const RowArguments& a, const Tensor& logits) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  STD_TORCH_CHECK(a.rows <= INT_MAX && a.columns <= INT_MAX / 2, "cross_entropy_ cannot take ", a.rows, " rows of ", a.columns);
  if (a.rates != nullptr) {
    a.half ? row_pass<Half, true>(a, logits) : row_pass<float, true>(a, logits);
  } else {
    a.half ? row_pass<Half, false>(a, logits) : row_pass<float, false>(a, logits);
  }
}

}  // namespace
}  // namespace atat_fast

STABLE_TORCH_LIBRARY_IMPL(atat_fast_c, CUDA, m) {
  m.impl("cross_entropy_", TORCH_BOX(&atat_fast::cross_entropy<&atat_fast::cross_entropy_cuda>));
}
