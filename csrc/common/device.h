// torch's stream and the driver's CUDA version, and the check of a CUDA call.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace atat_fast {

// Whether `current_stream` can answer: not under a CPU-only torch, nor if the library does not name libtorch.so as needed.
bool reaches_stream();

// The newest CUDA that the driver supports, such as 13000, or 0 without a driver. Touches no device.
int64_t cuda_driver();

// The stream torch would launch on now. Launch on this one only: graph capture and record_stream miss kernels on any other.
cudaStream_t current_stream(int32_t device_index);

// Throws if a call of CUDA's runtime failed.
void check_cuda(const char* op, cudaError_t status);

}  // namespace atat_fast
