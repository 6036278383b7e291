// cross_entropy_, the row pass of linear_cross_entropy, from torch's tensors to plain pointers: checks only.
#pragma once

#include "../common/tensor.h"
#include "rule.h"

namespace atat_fast {
namespace {

// The op on the device that `run` is for.
template <void (*run)(const RowArguments&, const Tensor& logits)>
void cross_entropy(Tensor logits, Tensor target, std::optional<Tensor> token_weight, std::optional<Tensor> hidden,
                   std::optional<Tensor> weight, std::optional<Tensor> bias, bool gradient, Tensor nll,
                   std::optional<Tensor> max_probability, std::optional<Tensor> entropy, std::optional<Tensor> bias_gradient,
                   std::optional<Tensor> rates, std::optional<Tensor> elapsed, std::optional<Tensor> velocity) {
  const ScalarType type = logits.scalar_type();
  const bool half = is_half("cross_entropy_", type);
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be a matrix");
  STD_TORCH_CHECK(logits.size(1) < 2 || logits.stride(1) == 1, "each row of logits must be contiguous");
  STD_TORCH_CHECK(hidden.has_value() == weight.has_value(), "hidden and weight are given together");
  STD_TORCH_CHECK(rates.has_value() == velocity.has_value() && (rates.has_value() || !elapsed.has_value()),
                  "rates and velocity are given together, and elapsed with them");
  const int64_t rows = logits.size(0), columns = logits.size(1), width = hidden ? hidden->size(1) : 0;
  STD_TORCH_CHECK(!weight || (weight->dim() == 2 && weight->size(1) == width), "hidden and weight disagree");

  const Reader reader("cross_entropy_", logits);
  RowArguments a{};
  a.logits = logits.mutable_data_ptr();
  a.target = reader.in_place<int64_t>(target, "target", rows);
  a.token_weight = reader.in_place<float>(token_weight, "token_weight", rows);
  a.hidden = reader.in_place(hidden, "hidden", type, rows * width);
  a.weight = reader.in_place(weight, "weight", type, weight ? weight->numel() : 0);
  a.bias = reader.in_place(bias, "bias", type, columns);
  a.nll = reader.in_place<float>(nll, "nll", rows);
  a.max_probability = reader.in_place<float>(max_probability, "max_probability", rows);
  a.entropy = reader.in_place<float>(entropy, "entropy", rows);
  a.bias_gradient = reader.in_place<float>(bias_gradient, "bias_gradient", columns);
  a.rates = reader.in_place<float>(rates, "rates", columns);
  a.elapsed = reader.in_place<float>(elapsed, "elapsed", rows);
  a.velocity = reader.in_place<float>(velocity, "velocity", rows);
  STD_TORCH_CHECK(is_aligned(a.rates), "rates must lie at a multiple of 16 bytes");
  a.rows = rows;
  a.columns = columns;
  a.stride = rows > 1 ? logits.stride(0) : columns;
  a.width = width;
  a.vocabulary = weight && weight->size(0) < columns ? weight->size(0) : columns;
  a.gradient = gradient;
  a.half = half;
  if (rows > 0 && columns > 0) run(a, logits);
}

}  // namespace
}  // namespace atat_fast
