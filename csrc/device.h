// What every CUDA source needs from torch beyond tensors.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace atat_fast {

// Whether `current_stream` can answer: not under a CPU-only torch, nor where the library does not name libtorch.so as needed.
bool reaches_stream();

// The newest CUDA that the driver serves, such as 13000, or 0 without a driver. Touches no device.
int64_t cuda_driver();

// The stream torch would launch on now. Launch on this one only, or graph capture and record_stream miss the kernel.
cudaStream_t current_stream(int32_t device_index);

}  // namespace atat_fast
