// What every CUDA source needs from torch beyond tensors.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace atat_fast {

// The stream torch would launch on now. Launch on this one only, or graph capture and record_stream miss the kernel.
cudaStream_t current_stream(int32_t device_index);

}  // namespace atat_fast
