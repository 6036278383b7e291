// philox(index, seed, step, stream): the four words of every index, for tests and for users of the generator itself.

#include "op.h"

namespace atat_fast {
namespace {

void philox_cpu(const PhiloxArguments& a, const Tensor&) {
  torch::stable::parallel_for(0, a.count, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto four = random_words(static_cast<uint64_t>(a.index[i]), static_cast<uint64_t>(*a.seed),
                                     static_cast<uint32_t>(*a.step), a.stream);
      for (int j = 0; j < 4; ++j) a.out[4 * i + j] = four.word[j];
    }
  });
}

}  // namespace
}  // namespace atat_fast

STABLE_TORCH_LIBRARY_IMPL(atat_fast_c, CPU, m) {
  m.impl("philox", TORCH_BOX(&atat_fast::philox<&atat_fast::philox_cpu>));
}
