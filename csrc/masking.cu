// mask_tokens on a GPU: the launch. The kernel is in masking.cuh.

#include "masking.cuh"

#include "device.h"
#include "masking_op.h"

#include <torch/csrc/stable/accelerator.h>

namespace atat_fast {
namespace {

// One sequence's keys have to fit a CTA's shared memory: 64 KB of the 99 KB an sm_89 has. LONGEST in atat_fast/ops/masking.py.
constexpr int64_t kLongest = 16384;

template <typename Id>
void launch(const MaskArguments& a, bool aligned, cudaStream_t stream) {
  const auto bytes = static_cast<int>(shared_bytes(a.length));
  if (bytes > 48 * 1024) {
    const auto asked = cudaFuncSetAttribute(mask_tokens_kernel<Id>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    STD_TORCH_CHECK(asked == cudaSuccess, "mask_tokens: ", cudaGetErrorString(asked));
  }
  mask_tokens_kernel<Id><<<static_cast<unsigned>(a.batch), thread_count(a.length), bytes, stream>>>(a, aligned);
  const auto launched = cudaGetLastError();
  STD_TORCH_CHECK(launched == cudaSuccess, "mask_tokens: ", cudaGetErrorString(launched));
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

MaskedTensors mask_tokens(Tensor tokens, Tensor num_masked, int64_t num_rows, int64_t mask_id, std::optional<Tensor> scores,
                          double tilt, double focus, std::optional<Tensor> eligible, std::optional<Tensor> frozen,
                          int64_t weighting, Tensor seed, Tensor step, Tensor sample_ids, int64_t stream) {
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  MaskCall call(tokens, num_masked, num_rows, mask_id, scores, tilt, focus, eligible, frozen, weighting, seed, step, sample_ids,
                stream);
  const MaskArguments& a = call.arguments;
  STD_TORCH_CHECK(a.length <= kLongest, "mask_tokens: a sequence has more than ", kLongest, " tokens");
  const cudaStream_t current = current_stream(tokens.get_device_index());
  if (a.batch == 0 || a.length == 0) {
    cudaMemsetAsync(a.rows, 0, num_rows * sizeof(*a.rows), current);
    cudaMemsetAsync(a.weights, 0, num_rows * sizeof(*a.weights), current);
    return call.outputs();
  }
  const bool aligned = a.length % kGroup == 0 && is_aligned(a.tokens) && is_aligned(a.noisy) && is_aligned(a.scores) &&
                       is_aligned(a.eligible) && is_aligned(a.frozen);
  if (a.wide_ids) {
    launch<int64_t>(a, aligned, current);
  } else {
    launch<int32_t>(a, aligned, current);
  }
  return call.outputs();
}

}  // namespace
}  // namespace atat_fast

STABLE_TORCH_LIBRARY_IMPL(atat_fast_c, CUDA, m) {
  m.impl("mask_tokens", TORCH_BOX(&atat_fast::mask_tokens));
}
