// From torch's tensors to the plain arguments of the row pass: checks only. Shared by cross_entropy.cpp and .cu.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cross_entropy.h"

namespace atat_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {  // the library hides its symbols, and torch's tensors are hidden in each of its files

// The caller keeps the tensors alive.
class RowCall {
 public:
  RowCall(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& token_weight, const std::optional<Tensor>& hidden,
          const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, bool gradient, const Tensor& nll,
          const std::optional<Tensor>& max_probability, const std::optional<Tensor>& entropy,
          const std::optional<Tensor>& bias_gradient, const std::optional<Tensor>& rates, const std::optional<Tensor>& elapsed,
          const std::optional<Tensor>& velocity)
      : device_(logits.get_device_index()), on_cpu_(logits.is_cpu()) {
    const ScalarType type = logits.scalar_type();
    const bool half = type == ScalarType::BFloat16;
    STD_TORCH_CHECK(logits.dim() == 2 && (half || type == ScalarType::Float), "logits must be a matrix of float32 or bfloat16");
    STD_TORCH_CHECK(logits.size(1) < 2 || logits.stride(1) == 1, "each row of logits must be contiguous");
    STD_TORCH_CHECK(hidden.has_value() == weight.has_value(), "hidden and weight are given together");
    const int64_t rows = logits.size(0), columns = logits.size(1), width = hidden.has_value() ? hidden->size(1) : 0;
    STD_TORCH_CHECK(!weight.has_value() || (weight->dim() == 2 && weight->size(1) == width), "hidden and weight disagree");
    arguments.rows = rows;
    arguments.columns = columns;
    arguments.stride = rows > 1 ? logits.stride(0) : columns;
    arguments.width = width;
    arguments.gradient = gradient;
    arguments.half = half;
    arguments.logits = logits.mutable_data_ptr();
    arguments.target = static_cast<const int64_t*>(expect(target, "target", ScalarType::Long, rows));
    arguments.nll = static_cast<float*>(expect(nll, "nll", ScalarType::Float, rows));
    arguments.token_weight = static_cast<const float*>(optional(token_weight, "token_weight", ScalarType::Float, rows));
    arguments.hidden = optional(hidden, "hidden", type, rows * width);
    arguments.weight = optional(weight, "weight", type, -1);
    arguments.bias = optional(bias, "bias", type, columns);
    arguments.max_probability = static_cast<float*>(optional(max_probability, "max_probability", ScalarType::Float, rows));
    arguments.entropy = static_cast<float*>(optional(entropy, "entropy", ScalarType::Float, rows));
    arguments.bias_gradient = static_cast<float*>(optional(bias_gradient, "bias_gradient", ScalarType::Float, columns));
    STD_TORCH_CHECK(rates.has_value() == velocity.has_value() && (rates.has_value() || !elapsed.has_value()),
                    "rates and velocity are given together, and elapsed with them");
    arguments.rates = static_cast<const float*>(optional(rates, "rates", ScalarType::Float, columns));
    arguments.elapsed = static_cast<const float*>(optional(elapsed, "elapsed", ScalarType::Float, rows));
    arguments.velocity = static_cast<float*>(optional(velocity, "velocity", ScalarType::Float, rows));
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(arguments.rates) % 16 == 0, "rates must lie at a multiple of 16 bytes");
    arguments.vocabulary = weight.has_value() && weight->size(0) < columns ? weight->size(0) : columns;
  }

  RowArguments arguments{};

 private:
  void* expect(const Tensor& tensor, const char* name, ScalarType type, int64_t elements) const {
    STD_TORCH_CHECK(tensor.scalar_type() == type && (elements < 0 || tensor.numel() == elements), "cross_entropy_: ", name,
                    " has the wrong dtype or number of elements");
    STD_TORCH_CHECK(tensor.is_contiguous(), "cross_entropy_: ", name, " must be contiguous");
    STD_TORCH_CHECK(tensor.is_cpu() == on_cpu_ && tensor.get_device_index() == device_, "cross_entropy_: ", name,
                    " must be on the logits' device");
    return tensor.mutable_data_ptr();
  }

  void* optional(const std::optional<Tensor>& given, const char* name, ScalarType type, int64_t elements) const {
    return given.has_value() ? expect(*given, name, type, elements) : nullptr;
  }

  int32_t device_;
  bool on_cpu_;
};

}  // namespace
}  // namespace atat_fast
