#include "device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "error_code.h"

// A CPU-only torch does not define this symbol. Because it is weak it is null there instead of a load error, and the library's
// CPU ops stay usable.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace atat_fast {

bool reaches_stream() { return aoti_torch_get_current_cuda_stream != nullptr; }

int64_t cuda_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

cudaStream_t current_stream(int32_t device_index) {
  STD_TORCH_CHECK(reaches_stream(), "this torch gives the compiled library no CUDA stream; `python -m atat_fast.ops` says why");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_cuda(const char* op, cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, op, ": ", cudaGetErrorString(status));
}

}  // namespace atat_fast
