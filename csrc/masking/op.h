// mask_tokens from torch's tensors to plain pointers: checks, contiguous copies and outputs.
#pragma once

#include <tuple>

#include "../common/tensor.h"
#include "rule.h"

namespace atat_fast {

using MaskedTensors = std::tuple<Tensor, Tensor, Tensor>;

namespace {

// The op on the device that `run` is for.
template <void (*run)(const MaskArguments&, const Tensor& tokens)>
MaskedTensors mask_tokens(Tensor tokens, Tensor num_masked, int64_t num_rows, int64_t mask_id, std::optional<Tensor> scores,
                          double tilt, double focus, int64_t spread, std::optional<Tensor> eligible,
                          std::optional<Tensor> frozen, int64_t weighting, Tensor seed, Tensor step, Tensor sample_ids, int64_t stream) {
  const ScalarType id_type = tokens.scalar_type();
  STD_TORCH_CHECK(tokens.dim() == 2 && (id_type == ScalarType::Long || id_type == ScalarType::Int),
                  "mask_tokens takes tokens as a matrix of int32 or int64");
  STD_TORCH_CHECK(num_rows >= 0 && weighting >= kUniform && weighting <= kCrossEntropy, "mask_tokens has no such weighting");
  STD_TORCH_CHECK(scores.has_value() || weighting == kUniform || weighting == kCrossEntropy, "this weighting needs scores");
  const int64_t batch = tokens.size(0), length = tokens.size(1), elements = batch * length;
  Tensor noisy = torch::stable::new_empty(tokens, {batch, length});
  Tensor rows = torch::stable::new_empty(tokens, {num_rows}, ScalarType::Long);
  Tensor weights = torch::stable::new_empty(tokens, {num_rows}, ScalarType::Float);

  Reader reader("mask_tokens", tokens);
  MaskArguments a{};
  a.tokens = reader.read(tokens, "tokens", id_type, elements);
  a.num_masked = reader.read<int64_t>(num_masked, "num_masked", batch);
  a.sample_ids = reader.read<int64_t>(sample_ids, "sample_ids", batch);
  a.seed = reader.read<int64_t>(seed, "seed", 1);
  a.step = reader.read<int64_t>(step, "step", 1);
  a.scores = reader.read<float>(scores, "scores", elements);
  a.eligible = reader.read<uint8_t>(eligible, "eligible", elements);
  a.frozen = reader.read<uint8_t>(frozen, "frozen", elements);
  a.noisy = noisy.mutable_data_ptr();
  a.rows = rows.mutable_data_ptr<int64_t>();
  a.weights = weights.mutable_data_ptr<float>();
  a.batch = batch;
  a.length = length;
  a.num_rows = num_rows;
  a.mask_id = mask_id;
  a.tilt = static_cast<float>(tilt);
  a.focus = static_cast<float>(focus);
  a.spread = spread;
  a.weighting = static_cast<int>(weighting);
  a.stream = static_cast<uint32_t>(stream);
  a.wide_ids = id_type == ScalarType::Long;
  run(a, tokens);
  return {noisy, rows, weights};
}

}  // namespace
}  // namespace atat_fast
