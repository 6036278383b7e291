// From torch's tensors to the plain arguments of mask_tokens: checks, contiguous copies, outputs. Shared by masking.cpp and .cu.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "masking.h"

namespace atat_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaskedTensors = std::tuple<Tensor, Tensor, Tensor>;

namespace {  // the library hides its symbols, and torch's tensors are hidden in each of its files

class MaskCall {
 public:
  MaskCall(const Tensor& tokens, const Tensor& num_masked, int64_t num_rows, int64_t mask_id,
           const std::optional<Tensor>& scores, double tilt, double focus, const std::optional<Tensor>& eligible,
           const std::optional<Tensor>& frozen, int64_t weighting, const Tensor& seed, const Tensor& step,
           const Tensor& sample_ids, int64_t stream)
      : tokens_(torch::stable::contiguous(tokens)),
        num_masked_(torch::stable::contiguous(num_masked)),
        sample_ids_(torch::stable::contiguous(sample_ids)),
        seed_(seed),
        step_(step) {
    const bool wide = tokens.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(tokens.dim() == 2 && (wide || tokens.scalar_type() == ScalarType::Int),
                    "mask_tokens takes tokens as a matrix of int32 or int64");
    STD_TORCH_CHECK(num_rows >= 0 && weighting >= kUniform && weighting <= kCrossEntropy, "mask_tokens has no such weighting");
    STD_TORCH_CHECK(scores.has_value() || weighting == kUniform || weighting == kCrossEntropy, "this weighting needs scores");
    const int64_t batch = tokens.size(0), length = tokens.size(1);
    expect(num_masked_, "num_masked", ScalarType::Long, batch);
    expect(sample_ids_, "sample_ids", ScalarType::Long, batch);
    expect(seed_, "seed", ScalarType::Long, 1);
    expect(step_, "step", ScalarType::Long, 1);

    arguments.tokens = tokens_.const_data_ptr();
    arguments.wide_ids = wide;
    arguments.batch = batch;
    arguments.length = length;
    arguments.num_masked = num_masked_.const_data_ptr<int64_t>();
    arguments.sample_ids = sample_ids_.const_data_ptr<int64_t>();
    arguments.seed = seed_.const_data_ptr<int64_t>();
    arguments.step = step_.const_data_ptr<int64_t>();
    arguments.num_rows = num_rows;
    arguments.mask_id = mask_id;
    arguments.tilt = static_cast<float>(tilt);
    arguments.focus = static_cast<float>(focus);
    arguments.weighting = static_cast<int>(weighting);
    arguments.stream = static_cast<uint32_t>(stream);
    arguments.scores = optional<float>(scores, scores_, "scores", ScalarType::Float, batch * length);
    arguments.eligible = optional<uint8_t>(eligible, eligible_, "eligible", ScalarType::Bool, batch * length);
    arguments.frozen = optional<uint8_t>(frozen, frozen_, "frozen", ScalarType::Bool, batch * length);

    noisy_ = torch::stable::new_empty(tokens_, {batch, length});
    rows_ = torch::stable::new_empty(tokens_, {num_rows}, ScalarType::Long);
    weights_ = torch::stable::new_empty(tokens_, {num_rows}, ScalarType::Float);
    arguments.noisy = noisy_.mutable_data_ptr();
    arguments.rows = rows_.mutable_data_ptr<int64_t>();
    arguments.weights = weights_.mutable_data_ptr<float>();
  }

  MaskedTensors outputs() const { return {noisy_, rows_, weights_}; }
  const Tensor& tokens() const { return tokens_; }

  MaskArguments arguments{};

 private:
  void expect(const Tensor& tensor, const char* name, ScalarType type, int64_t elements) const {
    STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.numel() == elements, "mask_tokens: ", name,
                    " has the wrong dtype or number of elements");
    STD_TORCH_CHECK(tensor.is_cpu() == tokens_.is_cpu() && tensor.get_device_index() == tokens_.get_device_index(),
                    "mask_tokens: ", name, " must be on tokens' device");
  }

  template <typename T>
  const T* optional(const std::optional<Tensor>& given, Tensor& held, const char* name, ScalarType type, int64_t elements) {
    if (!given.has_value()) return nullptr;
    held = torch::stable::contiguous(*given);
    expect(held, name, type, elements);
    return static_cast<const T*>(held.const_data_ptr());
  }

  Tensor tokens_, num_masked_, sample_ids_, seed_, step_, scores_, eligible_, frozen_, noisy_, rows_, weights_;
};

}  // namespace
}  // namespace atat_fast
