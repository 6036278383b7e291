// The kernel of csrc/masking/kernel.cuh, run on a CPU for tests/ops/masking/test_cuda_on_host.py.

#include "../cuda_on_host.h"

#include "../../../csrc/masking/kernel.cuh"

#include <cstring>

namespace atat_fast {
uint4 shared_memory[(232448 + 16) / 16];  // what `extern __shared__` names: all an sm_90 has, and a line that nobody may touch
}

extern "C" {

int64_t shared_bytes(int64_t length) { return atat_fast::shared_bytes(length); }

int64_t thread_count(int64_t length) { return atat_fast::thread_count(length); }

int64_t argument_bytes() { return sizeof(atat_fast::MaskArguments); }

// Returns 1 when the kernel wrote past the shared memory it asked for.
int run_mask_tokens(const atat_fast::MaskArguments* arguments, int aligned, unsigned seed) {
  using namespace atat_fast;
  auto* bytes = reinterpret_cast<unsigned char*>(shared_memory);
  std::memset(bytes, 0xA5, sizeof(shared_memory));  // whatever an earlier kernel left
  const auto blocks = static_cast<unsigned>(arguments->batch);
  const auto threads = static_cast<unsigned>(atat_fast::thread_count(arguments->length));
  cuda_on_host::launch(blocks, threads, seed, [&] {
    if (arguments->wide_ids) {
      mask_tokens_kernel<int64_t>(*arguments, aligned != 0);
    } else {
      mask_tokens_kernel<int32_t>(*arguments, aligned != 0);
    }
  });
  for (size_t i = atat_fast::shared_bytes(arguments->length); i < sizeof(shared_memory); ++i) {
    if (bytes[i] != 0xA5) return 1;
  }
  return 0;
}
}
