// From torch's tensors to the plain arguments of adaptive_norm.h: checks, contiguous copies where they are needed, and outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <list>
#include <optional>
#include <utility>

#include "adaptive_norm.h"
#include "error_code.h"

namespace atat_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {  // the library hides its symbols, and torch's tensors are hidden in each of its files

bool is_half(ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "adaptive norms take float32 and bfloat16");
  return type == ScalarType::BFloat16;
}

// Reads one call's tensors, and holds the copies that had to be made of them.
class NormCall {
 public:
  NormCall(const Tensor& stream, const Tensor& scale) : batch(stream.size(0)), length(stream.size(1)), width(stream.size(2)) {
    STD_TORCH_CHECK(stream.dim() == 3 && scale.dim() == 2 && width > 0, "adaptive norms take a stream [B, L, D] and rows [B, D]");
    groups = scale.size(0);
    STD_TORCH_CHECK(groups == 1 || groups == batch, "conditioning has 1 row or one a sample");
  }

  // A tensor of this many elements, contiguous.
  Values values(const Tensor& given, int64_t elements) {
    const bool half = is_half(given.scalar_type());
    STD_TORCH_CHECK(given.is_cpu() && given.numel() == elements, "a tensor of adaptive norms has the wrong device or size");
    return {given.is_contiguous() ? given.const_data_ptr() : hold(torch::stable::contiguous(given)), half};
  }

  Values values(const std::optional<Tensor>& given, int64_t elements) { return given ? values(*given, elements) : Values{}; }

  // Rows of conditioning are read where they lie, apart or not, as long as each is in one piece.
  Conditioning rows(const Tensor& given) {
    STD_TORCH_CHECK(given.dim() == 2 && given.size(0) == groups && given.size(1) == width, "rows of conditioning disagree");
    if (width > 1 && given.stride(1) != 1) return {values(given, groups * width), groups == 1 ? 0 : width};
    STD_TORCH_CHECK(given.is_cpu(), "a tensor of adaptive norms has the wrong device");
    return {{given.const_data_ptr(), is_half(given.scalar_type())}, groups == 1 ? 0 : given.stride(0)};
  }

  Dropout dropout(double chance, const std::optional<Tensor>& seed, const std::optional<Tensor>& step,
                  const std::optional<Tensor>& sample_ids, int64_t stream) {
    Dropout dropout;
    if (chance == 0) return dropout;
    STD_TORCH_CHECK(chance > 0 && chance < 1 && seed && step && sample_ids, "dropout needs a chance, seed, step and sample_ids");
    set_chance(dropout, chance);
    dropout.seed = static_cast<uint64_t>(*integers(*seed, 1));
    dropout.step = static_cast<uint32_t>(*integers(*step, 1));
    dropout.sample_ids = integers(*sample_ids, batch);
    dropout.stream = static_cast<uint32_t>(stream);
    return dropout;
  }

  Tensor dense(ScalarType type) const { return fresh<3>({batch, length, width}, type); }
  Tensor statistic() const { return fresh<3>({batch, length, 1}, ScalarType::Float); }
  Tensor row_gradient(ScalarType type) const { return fresh<2>({groups, width}, type); }
  Tensor weight_gradient(ScalarType type, bool given) const { return fresh<1>({given ? width : 0}, type); }

  int64_t batch, length, width, groups;

 private:
  // A contiguous tensor that holds anything. torch::stable::new_empty looks an operator up by name each time: 0.7 us an output.
  template <size_t kDims>
  static Tensor fresh(const std::array<int64_t, kDims>& sizes, ScalarType type) {
    std::array<int64_t, kDims> strides;
    int64_t stride = 1;
    for (size_t i = kDims; i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
    AtenTensorHandle handle;
    const int32_t dtype = is_half(type) ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32();
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(kDims, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }

  const void* hold(Tensor copy) { return copies_.emplace_back(std::move(copy)).const_data_ptr(); }

  const int64_t* integers(const Tensor& given, int64_t elements) {
    STD_TORCH_CHECK(given.is_cpu() && given.scalar_type() == ScalarType::Long && given.numel() == elements,
                    "seed, step and sample_ids are int64 on the stream's device");
    return static_cast<const int64_t*>(given.is_contiguous() ? given.const_data_ptr() : hold(torch::stable::contiguous(given)));
  }

  std::list<Tensor> copies_;
};

}  // namespace
}  // namespace atat_fast
