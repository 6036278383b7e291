// Schemas of the one shared library, libatat_fast.so. It uses torch's stable ABI only, and not Python, so one build serves every
// supported torch. Each op's folder registers its implementations; fake and autograd ones are in atat_fast/ops.

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <iterator>

#ifdef USE_CUDA
#include "common/device.h"
#endif

namespace {

// Keep in step with CPU_OPS and CUDA_KERNELS in atat_fast/ops/library.py.
constexpr int64_t kCpuOps = 1 << 0;
constexpr int64_t kCudaKernels = 1 << 1;

// What was compiled in, whatever machine it runs on.
int64_t build_flags() {
#ifdef USE_CUDA
  return kCpuOps | kCudaKernels;
#else
  return kCpuOps;
#endif
}

// What the kernels were compiled for: 89 is machine code of sm_89, -90 the PTX of compute_90, which newer devices translate. 0
// past the last. setup.py gives the list.
int64_t cuda_target([[maybe_unused]] int64_t index) {
#ifdef ATAT_FAST_CUDA_TARGETS
#define TARGET(number) number,
  constexpr int64_t targets[] = {ATAT_FAST_CUDA_TARGETS};
#undef TARGET
  if (index >= 0 && index < static_cast<int64_t>(std::size(targets))) return targets[index];
#endif
  return 0;
}

// The version of the CUDA runtime in the library, such as 13000; 0 in a build without CUDA.
int64_t cuda_runtime() {
#ifdef USE_CUDA
  return CUDART_VERSION;
#else
  return 0;
#endif
}

// The newest CUDA that the driver supports, and whether torch tells the library which stream to launch on.
int64_t cuda_driver() {
#ifdef USE_CUDA
  return atat_fast::cuda_driver();
#else
  return 0;
#endif
}

bool reaches_stream() {
#ifdef USE_CUDA
  return atat_fast::reaches_stream();
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(atat_fast_c, m) {
  m.def("build_flags() -> int");
  m.def("cuda_target(int index) -> int");
  m.def("cuda_runtime() -> int");
  m.def("cuda_driver() -> int");
  m.def("reaches_stream() -> bool");
  m.def("philox(Tensor index, Tensor seed, Tensor step, int stream) -> Tensor");
  m.def(
      "mask_tokens(Tensor tokens, Tensor num_masked, int num_rows, int mask_id, Tensor? scores, float tilt, float focus, "
      "int spread, Tensor? eligible, Tensor? frozen, int weighting, Tensor seed, Tensor step, Tensor sample_ids, int stream) "
      "-> (Tensor noisy, Tensor rows, Tensor weights)");
  m.def(
      "cross_entropy_(Tensor(a!) logits, Tensor target, Tensor? token_weight, Tensor? hidden, Tensor? weight, Tensor? bias, "
      "bool gradient, Tensor(b!) nll, Tensor(c!)? max_probability, Tensor(d!)? entropy, Tensor(e!)? bias_gradient, "
      "Tensor? rates, Tensor? elapsed, Tensor(f!)? velocity) -> ()");
  m.def(
      "linear_categorical(Tensor logits, Tensor index, int forbidden, float inverse_temperature, Tensor seed, Tensor step) "
      "-> Tensor");
  m.def("rotary(Tensor(a!) out, Tensor qkv, Tensor cos, Tensor sin, bool inverse) -> ()");
  m.def("rotary_normed(Tensor(a!) out, Tensor(b!)? rstd, Tensor qkv, Tensor cos, Tensor sin, float eps) -> ()");
  m.def(
      "rotary_normed_backward(Tensor(a!) dqkv, Tensor grad, Tensor out, Tensor rstd, Tensor cos, Tensor sin) -> ()");
  m.def(
      "adaptive_layer_norm(Tensor x, Tensor shift, Tensor scale, Tensor? weight, float eps, ScalarType out_dtype) "
      "-> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "adaptive_layer_norm_backward(Tensor dy, Tensor x, Tensor scale, Tensor? weight, Tensor mean, Tensor rstd, "
      "ScalarType shift_dtype) -> (Tensor dx, Tensor dshift, Tensor dscale, Tensor dweight)");
  m.def(
      "gated_residual_norm(Tensor residual, Tensor branch, Tensor gate, Tensor shift, Tensor scale, Tensor? weight, "
      "float dropout, Tensor? seed, Tensor? step, Tensor? sample_ids, int stream, float eps, ScalarType out_dtype) "
      "-> (Tensor total, Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "gated_residual_norm_backward(Tensor? dtotal, Tensor? dy, Tensor total, Tensor branch, Tensor gate, Tensor scale, "
      "Tensor? weight, Tensor mean, Tensor rstd, float dropout, Tensor? seed, Tensor? step, Tensor? sample_ids, int stream, "
      "ScalarType shift_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

// An op without a tensor argument has no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(atat_fast_c, CompositeExplicitAutograd, m) {
  m.impl("build_flags", TORCH_BOX(&build_flags));
  m.impl("cuda_target", TORCH_BOX(&cuda_target));
  m.impl("cuda_runtime", TORCH_BOX(&cuda_runtime));
  m.impl("cuda_driver", TORCH_BOX(&cuda_driver));
  m.impl("reaches_stream", TORCH_BOX(&reaches_stream));
}
