// philox(index, seed, step, stream): the four words of every index, for tests and for whoever wants the generator itself.

#include "philox.h"

#include "philox_op.h"

namespace atat_fast {
namespace {

Tensor philox(Tensor index, Tensor seed, Tensor step, int64_t stream) {
  const PhiloxCall call(index, seed, step);
  torch::stable::parallel_for(0, call.count, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto four = random_words(static_cast<uint64_t>(call.in[i]), static_cast<uint64_t>(*call.key),
                                     static_cast<uint32_t>(*call.now), static_cast<uint32_t>(stream));
      for (int j = 0; j < 4; ++j) call.out[4 * i + j] = four.word[j];
    }
  });
  return call.words;
}

}  // namespace
}  // namespace atat_fast

STABLE_TORCH_LIBRARY_IMPL(atat_fast_c, CPU, m) {
  m.impl("philox", TORCH_BOX(&atat_fast::philox));
}
