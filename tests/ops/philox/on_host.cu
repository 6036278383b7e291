// The rules of csrc/common/philox.h and csrc/masking/rule.h, run on a CPU for tests/ops/philox/test_cuda_on_host.py.

#include "../../../csrc/masking/rule.h"

extern "C" {

void philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1, uint32_t* out) {
  const auto words = atat_fast::philox4x32(c0, c1, c2, c3, k0, k1);
  for (int i = 0; i < 4; ++i) out[i] = words.word[i];
}

void words(int64_t index, int64_t seed, int64_t step, uint32_t stream, uint32_t* out) {
  const auto four = atat_fast::random_words(index, seed, static_cast<uint32_t>(step), stream);
  for (int i = 0; i < 4; ++i) out[i] = four.word[i];
}

float gumbel(uint32_t word) { return atat_fast::gumbel(word); }

uint32_t ordered(float value) { return atat_fast::ordered(value); }

void radix_select(const uint32_t* keys, const uint8_t* may_hide, int64_t length, int32_t wanted, uint32_t* key, int32_t* ties) {
  const auto threshold = atat_fast::select_threshold(keys, may_hide, length, wanted);
  *key = threshold.key;
  *ties = threshold.ties;
}
}
