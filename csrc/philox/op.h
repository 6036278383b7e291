// philox(index, seed, step, stream) from torch's tensors to plain pointers: checks and the output.
#pragma once

#include "../common/philox.h"
#include "../common/tensor.h"

namespace atat_fast {

struct PhiloxArguments {
  const int64_t *index, *seed, *step;
  uint32_t stream;
  int64_t count;  // of index
  int64_t* out;   // [count, 4]
};

namespace {

// The op on the device that `run` is for.
template <void (*run)(const PhiloxArguments&, const Tensor& index)>
Tensor philox(Tensor index, Tensor seed, Tensor step, int64_t stream) {
  Reader reader("philox", index);
  std::vector<int64_t> shape(index.sizes().begin(), index.sizes().end());
  shape.push_back(4);
  Tensor words = torch::stable::new_empty(index, shape);
  PhiloxArguments a{};
  a.count = index.numel();
  a.index = reader.read<int64_t>(index, "index", a.count);
  a.seed = reader.read<int64_t>(seed, "seed", 1);
  a.step = reader.read<int64_t>(step, "step", 1);
  a.stream = static_cast<uint32_t>(stream);
  a.out = words.mutable_data_ptr<int64_t>();
  run(a, index);
  return words;
}

}  // namespace
}  // namespace atat_fast
