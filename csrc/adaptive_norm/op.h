// adaptive_layer_norm and gated_residual_norm from torch's tensors to plain pointers: checks, contiguous copies if they are
// needed, and outputs.
#pragma once

#include <array>

#include "../common/error_code.h"
#include "../common/tensor.h"
#include "rule.h"

namespace atat_fast {
namespace {

constexpr const char* kOp = "adaptive norm";

// Reads one call's tensors, and holds copies of those that are not contiguous.
class NormCall {
 public:
  NormCall(const Tensor& stream, const Tensor& scale)
      : batch(stream.size(0)), length(stream.size(1)), width(stream.size(2)), groups(scale.size(0)), reader_(kOp, stream) {
    STD_TORCH_CHECK(stream.is_cpu() && stream.dim() == 3 && scale.dim() == 2 && width > 0,
                    "adaptive norms take a stream [B, L, D] and rows [B, D] on the CPU");
    STD_TORCH_CHECK(groups == 1 || groups == batch, "conditioning has 1 row or one a sample");
  }

  // A tensor of fp32 or bf16 and of this many elements, contiguous.
  Values values(const Tensor& given, const char* name, int64_t elements) {
    const ScalarType type = given.scalar_type();
    return {reader_.read(given, name, type, elements), is_half(kOp, type)};
  }

  Values values(const std::optional<Tensor>& given, const char* name, int64_t elements) {
    return given ? values(*given, name, elements) : Values{};
  }

  // Rows of conditioning are read in place, apart or not, if each is contiguous.
  Conditioning rows(const Tensor& given, const char* name) {
    STD_TORCH_CHECK(given.dim() == 2 && given.size(1) == width, "rows of conditioning disagree");
    if (width > 1 && given.stride(1) != 1) return {values(given, name, groups * width), groups == 1 ? 0 : width};
    const ScalarType type = given.scalar_type();
    reader_.check(given, name, type, groups * width);
    return {{given.const_data_ptr(), is_half(kOp, type)}, groups == 1 ? 0 : given.stride(0)};
  }

  float* statistic(const Tensor& given, const char* name) {
    return const_cast<float*>(reader_.read<float>(given, name, batch * length));
  }

  Dropout dropout(double chance, const std::optional<Tensor>& seed, const std::optional<Tensor>& step,
                  const std::optional<Tensor>& sample_ids, int64_t stream) {
    Dropout dropout;
    if (chance == 0) return dropout;
    STD_TORCH_CHECK(chance > 0 && chance < 1 && seed && step && sample_ids, "dropout needs a chance, seed, step and sample_ids");
    set_chance(dropout, chance);
    dropout.seed = static_cast<uint64_t>(*reader_.read<int64_t>(seed, "seed", 1));
    dropout.step = static_cast<uint32_t>(*reader_.read<int64_t>(step, "step", 1));
    dropout.sample_ids = reader_.read<int64_t>(sample_ids, "sample_ids", batch);
    dropout.stream = static_cast<uint32_t>(stream);
    return dropout;
  }

  Tensor dense(ScalarType type) const { return fresh<3>({batch, length, width}, type); }
  Tensor new_statistic() const { return fresh<3>({batch, length, 1}, ScalarType::Float); }
  Tensor row_gradient(ScalarType type) const { return fresh<2>({groups, width}, type); }
  Tensor weight_gradient(ScalarType type, bool given) const { return fresh<1>({given ? width : 0}, type); }

  int64_t batch, length, width, groups;

 private:
  // A contiguous tensor of uninitialised memory. torch::stable::new_empty looks an operator up by name each time: 0.7 us an
  // output.
  template <size_t kDims>
  static Tensor fresh(const std::array<int64_t, kDims>& sizes, ScalarType type) {
    std::array<int64_t, kDims> strides;
    int64_t stride = 1;
    for (size_t i = kDims; i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
    AtenTensorHandle handle;
    const int32_t dtype = is_half(kOp, type) ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32();
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(kDims, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }

  Reader reader_;
};

}  // namespace
}  // namespace atat_fast
