// philox(index, seed, step, stream): the four words of every index, for tests and for whoever wants the generator itself.

#include "philox.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor philox(const Tensor& index, const Tensor& seed, const Tensor& step, int64_t stream) {
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long && seed.scalar_type() == ScalarType::Long &&
                      step.scalar_type() == ScalarType::Long && seed.numel() == 1 && step.numel() == 1,
                  "philox takes an int64 index, and seed and step as int64 tensors of one element");
  const Tensor indices = torch::stable::contiguous(index);
  std::vector<int64_t> shape(index.sizes().begin(), index.sizes().end());
  shape.push_back(4);
  Tensor words = torch::stable::new_empty(index, shape);
  const auto* in = indices.const_data_ptr<int64_t>();
  auto* out = words.mutable_data_ptr<int64_t>();
  const auto key = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  const auto now = static_cast<uint32_t>(*step.const_data_ptr<int64_t>());
  torch::stable::parallel_for(0, indices.numel(), 1 << 15, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto four = atat_fast::random_words(static_cast<uint64_t>(in[i]), key, now, static_cast<uint32_t>(stream));
      for (int j = 0; j < 4; ++j) out[4 * i + j] = four.word[j];
    }
  });
  return words;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(atat_fast_c, CPU, m) {
  m.impl("philox", TORCH_BOX(&philox));
}
