// philox(index, seed, step, stream) on a GPU. Bound by the 40 bytes an index takes in and out; one thread owns one index.

#include "op.h"

#include "../common/device.h"

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

void philox_cuda(const PhiloxArguments& a, const Tensor& index) {
  if (a.count == 0) return;
  const int32_t device = index.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto blocks = static_cast<unsigned>((a.count + 255) / 256);
  philox_kernel<<<blocks, 256, 0, current_stream(device)>>>(a.index, a.seed, a.step, a.stream, a.count, a.out);
  check_cuda("philox", cudaGetLastError());
}

}  // namespace
}  // namespace atat_fast

STABLE_TORCH_LIBRARY_IMPL(atat_fast_c, CUDA, m) {
  m.impl("philox", TORCH_BOX(&atat_fast::philox<&atat_fast::philox_cuda>));
}
