// rotary on the CPU: queries and keys of a packed projection are turned by their position in one pass over memory, where eager
// PyTorch makes about ten. out may be qkv itself.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace atat_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Bf16 {  // torch's bits; rounds to nearest even in a form that compilers turn into vector instructions
  uint16_t bits;
  Bf16() = default;
  explicit Bf16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    const uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
  }
  explicit operator float() const {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
};

// T is the element, W what it is computed in and what the tables hold.
template <typename T, typename W>
void rotate(const Tensor& out, const Tensor& qkv, const W* cos, const W* sin, W sign) {
  const int64_t length = qkv.size(1), heads = qkv.size(3), size = qkv.size(4), half = size / 2, turned = 2 * heads;
  const int64_t in_batch = qkv.stride(0), in_row = qkv.stride(1), out_batch = out.stride(0), out_row = out.stride(1);
  const T* in = static_cast<const T*>(qkv.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  const bool copies = to != in;
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, turned * size));
  torch::stable::parallel_for(0, qkv.size(0) * length, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / length, position = row % length;
      const T* x = in + b * in_batch + position * in_row;
      T* y = to + b * out_batch + position * out_row;
      const W *c = cos + position * half, *s = sin + position * half;
      for (int64_t head = 0; head < turned; ++head, x += size, y += size) {
#pragma GCC ivdep
        for (int64_t j = 0; j < half; ++j) {  // both halves are read before either is written
          const W first = static_cast<W>(x[j]), second = static_cast<W>(x[half + j]), turn = sign * s[j];
          y[j] = T(first * c[j] - second * turn);
          y[half + j] = T(first * turn + second * c[j]);
        }
      }
      if (copies) std::memcpy(y, x, sizeof(T) * heads * size);
    }
  });
}

void rotary(Tensor out, Tensor qkv, Tensor cos, Tensor sin, bool inverse) {
  const ScalarType type = qkv.scalar_type();
  const ScalarType wide = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3 && qkv.size(4) % 2 == 0, "rotary takes [B, L, 3, H, E], E even");
  for (const Tensor* packed : {&out, &qkv}) {
    STD_TORCH_CHECK(packed->is_cpu() && packed->scalar_type() == type && packed->dim() == 5, "rotary: out is not like qkv");
    for (int64_t i = 0; i < 5; ++i) STD_TORCH_CHECK(packed->size(i) == qkv.size(i), "rotary: out is not like qkv");
    STD_TORCH_CHECK(packed->numel() == 0 || (packed->stride(4) == 1 && packed->stride(3) == qkv.size(4) &&
                                             packed->stride(2) == qkv.size(3) * qkv.size(4)),
                    "rotary takes tensors that are dense in their last three dimensions");
  }
  for (const Tensor* table : {&cos, &sin}) {
    STD_TORCH_CHECK(table->is_cpu() && table->is_contiguous() && table->scalar_type() == wide &&
                        table->numel() == qkv.size(1) * (qkv.size(4) / 2),
                    "rotary takes contiguous tables [L, E / 2], fp64 for fp64 data and fp32 otherwise");
  }
  if (qkv.numel() == 0) return;
  if (type == ScalarType::Double) {
    rotate<double, double>(out, qkv, cos.const_data_ptr<double>(), sin.const_data_ptr<double>(), inverse ? -1.0 : 1.0);
  } else if (type == ScalarType::Float) {
    rotate<float, float>(out, qkv, cos.const_data_ptr<float>(), sin.const_data_ptr<float>(), inverse ? -1.0f : 1.0f);
  } else {
    STD_TORCH_CHECK(type == ScalarType::BFloat16, "rotary takes fp32, fp64 or bf16 on the CPU");
    rotate<Bf16, float>(out, qkv, cos.const_data_ptr<float>(), sin.const_data_ptr<float>(), inverse ? -1.0f : 1.0f);
  }
}

}  // namespace
}  // namespace atat_fast

STABLE_TORCH_LIBRARY_IMPL(atat_fast_c, CPU, m) {
  m.impl("rotary", TORCH_BOX(&atat_fast::rotary));
}
