// philox(index, seed, step, stream) on a GPU. Bound by the 40 bytes an index takes in and out; one thread owns one index.

#include "philox.h"

#include "device.h"
#include "philox_op.h"

#include <torch/csrc/stable/accelerator.h>

namespace atat_fast {
namespace {

__global__ void philox_kernel(const int64_t* index, const int64_t* seed, const int64_t* step, uint32_t stream, int64_t count,
                              int64_t* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const auto four =
      random_words(static_cast<uint64_t>(index[i]), static_cast<uint64_t>(*seed), static_cast<uint32_t>(*step), stream);
  for (int j = 0; j < 4; ++j) out[4 * i + j] = four.word[j];
}

Tensor philox(Tensor index, Tensor seed, Tensor step, int64_t stream) {
  const torch::stable::accelerator::DeviceGuard guard(index.get_device_index());
  const PhiloxCall call(index, seed, step);
  if (call.count > 0) {
    const auto blocks = static_cast<unsigned>((call.count + 255) / 256);
    const cudaStream_t current = current_stream(index.get_device_index());
    philox_kernel<<<blocks, 256, 0, current>>>(call.in, call.key, call.now, static_cast<uint32_t>(stream), call.count, call.out);
    const auto launched = cudaGetLastError();
    STD_TORCH_CHECK(launched == cudaSuccess, "philox: ", cudaGetErrorString(launched));
  }
  return call.words;
}

}  // namespace
}  // namespace atat_fast

STABLE_TORCH_LIBRARY_IMPL(atat_fast_c, CUDA, m) {
  m.impl("philox", TORCH_BOX(&atat_fast::philox));
}
