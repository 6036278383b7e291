// mask_tokens on a GPU: the launch.

#include "kernel.cuh"

#include "../common/device.h"
#include "op.h"

#include <torch/csrc/stable/accelerator.h>

namespace atat_fast {
namespace {

// One sequence's keys have to fit a CTA's shared memory: they are 64 KB of the 99 KB an sm_89 has. Keep in step with LONGEST in
// atat_fast/ops/masking.py.
constexpr int64_t kLongest = 16384;

template <typename Id>
void launch(const MaskArguments& a, bool aligned, cudaStream_t stream) {
  const auto bytes = static_cast<int>(shared_bytes(a.length));
  if (bytes > 48 * 1024) {
    check_cuda("mask_tokens", cudaFuncSetAttribute(mask_tokens_kernel<Id>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  }
  mask_tokens_kernel<Id><<<static_cast<unsigned>(a.batch), thread_count(a.length), bytes, stream>>>(a, aligned);
  check_cuda("mask_tokens", cudaGetLastError());
}

void mask_tokens_cuda(const MaskArguments& a, const Tensor& tokens) {
  STD_TORCH_CHECK(a.length <= kLongest, "mask_tokens: a sequence has ", a.length, " tokens and may have ", kLongest);
  const int32_t device = tokens.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t current = current_stream(device);
  if (a.batch == 0 || a.length == 0) {
    if (a.num_rows == 0) return;
    check_cuda("mask_tokens", cudaMemsetAsync(a.rows, 0, a.num_rows * sizeof(*a.rows), current));
    check_cuda("mask_tokens", cudaMemsetAsync(a.weights, 0, a.num_rows * sizeof(*a.weights), current));
    return;
  }
  const bool aligned = a.length % kGroup == 0 && is_aligned(a.tokens) && is_aligned(a.noisy) && is_aligned(a.scores) &&
                       is_aligned(a.eligible) && is_aligned(a.frozen);
  if (a.wide_ids) {
    launch<int64_t>(a, aligned, current);
  } else {
    launch<int32_t>(a, aligned, current);
  }
}

}  // namespace
}  // namespace atat_fast

STABLE_TORCH_LIBRARY_IMPL(atat_fast_c, CUDA, m) {
  m.impl("mask_tokens", TORCH_BOX(&atat_fast::mask_tokens<&atat_fast::mask_tokens_cuda>));
}
