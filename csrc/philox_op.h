// What philox.cpp and philox.cu share: the checks and the output of philox(index, seed, step, stream).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace atat_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct PhiloxCall {
  PhiloxCall(const Tensor& given, const Tensor& seed, const Tensor& step)
      : index(torch::stable::contiguous(given)), words(torch::stable::new_empty(given, shape_of(given))), count(index.numel()) {
    for (const Tensor* tensor : {&given, &seed, &step}) {
      STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Long && tensor->is_cpu() == given.is_cpu(),
                      "philox takes int64 tensors on one device");
    }
    STD_TORCH_CHECK(seed.numel() == 1 && step.numel() == 1, "philox takes one seed and one step");
    in = index.const_data_ptr<int64_t>();
    out = words.mutable_data_ptr<int64_t>();
    key = seed.const_data_ptr<int64_t>();
    now = step.const_data_ptr<int64_t>();
  }

  static std::vector<int64_t> shape_of(const Tensor& given) {
    std::vector<int64_t> shape(given.sizes().begin(), given.sizes().end());
    shape.push_back(4);
    return shape;
  }

  Tensor index, words;
  int64_t count;
  const int64_t *in, *key, *now;
  int64_t* out;
};

}  // namespace
}  // namespace atat_fast
