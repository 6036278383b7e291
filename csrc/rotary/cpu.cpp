// rotary on the CPU: queries and keys of a packed projection are turned by their position. This takes one pass over memory; eager
// PyTorch takes about ten, and about twenty if heads are first scaled to unit root-mean-square. out may be qkv itself.

#include "../common/lanes.h"
#include "../common/tensor.h"
#include "../common/vectorised.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace atat_fast {
namespace {

// T is the type of elements. W is the type they are computed in, and that of tables and reciprocal root-mean-squares.

// Turns one row's `turned` heads at x into y, which may be x. If kNorm, each head is scaled first, and rstd gets the scales. All
// of a row's scales are computed first: a sum ends in dependent operations, and the next head's sum can begin meanwhile.
template <typename T, typename W, bool kNorm, int64_t kSize>
ATAT_FAST_VECTORISED void turn_row(T* y, W* rstd, const T* x, const W* c, const W* s, int64_t turned, int64_t any, W sign,
                                   W eps) {
  const int64_t size = kSize ? kSize : any, half = size / 2;
  if (kNorm) {
    for (int64_t head = 0; head < turned; ++head) rstd[head] = dot(x + head * size, x + head * size, size);
#pragma omp simd
    for (int64_t head = 0; head < turned; ++head) rstd[head] = 1 / std::sqrt(rstd[head] / static_cast<W>(size) + eps);
  }
  for (int64_t head = 0; head < turned; ++head, x += size, y += size) {
    const W scale = kNorm ? rstd[head] : 1;
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {  // both halves are read before either is written
      const W first = scale * widened(x[j]), second = scale * widened(x[half + j]), turn = sign * s[j];
      narrow(y[j], first * c[j] - second * turn);
      narrow(y[half + j], first * turn + second * c[j]);
    }
  }
}

// The gradient of the above with kNorm, from y and its gradient g: dx = r (R^T g - z <g . y>) with z = R^T y / (cos^2 + sin^2),
// r the scale, R the turn and <> the mean over a head (docs/ops/rotary.md). Scratch holds half a head of reciprocals of
// cos^2 + sin^2, and a mean for each head.
template <typename T, typename W, int64_t kSize>
ATAT_FAST_VECTORISED void turn_row_back(T* dx, const T* g, const T* y, const W* rstd, const W* c, const W* s, W* scratch,
                                        int64_t turned, int64_t any) {
  const int64_t size = kSize ? kSize : any, half = size / 2;
  W *inverse = scratch, *means = scratch + half;
#pragma omp simd
  for (int64_t j = 0; j < half; ++j) inverse[j] = 1 / (c[j] * c[j] + s[j] * s[j]);
  for (int64_t head = 0; head < turned; ++head) means[head] = dot(g + head * size, y + head * size, size);
  for (int64_t head = 0; head < turned; ++head, dx += size, g += size, y += size) {
    const W mean = means[head] / static_cast<W>(size), r = rstd[head];
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
      const W share = mean * inverse[j];
      const W first = r * (widened(g[j]) - widened(y[j]) * share);
      const W second = r * (widened(g[half + j]) - widened(y[half + j]) * share);
      narrow(dx[j], first * c[j] + second * s[j]);
      narrow(dx[half + j], second * c[j] - first * s[j]);
    }
  }
}

// The rows of a packed tensor in memory.
template <typename T>
struct Rows {
  T* data;
  int64_t batch, row;
  T* at(int64_t b, int64_t position) const { return data + b * batch + position * row; }
};

template <typename T>
Rows<const T> rows_of(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
}

template <typename T>
Rows<T> writable_rows_of(Tensor& t) {
  return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0), t.stride(1)};
}

// Calls run(begin, end, length) with parts of all rows, of about 2^15 elements each.
template <typename Run>
void for_rows(const Tensor& qkv, const Run& run) {
  const int64_t length = qkv.size(1), elements = std::max<int64_t>(1, 2 * qkv.size(3) * qkv.size(4));
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / elements);
  torch::stable::parallel_for(0, qkv.size(0) * length, grain, [&](int64_t begin, int64_t end) { run(begin, end, length); });
}

struct Tables {
  const void *cos, *sin;
};

template <typename T, typename W, bool kNorm>
void turn(Tensor& out, void* rstd, const Tensor& qkv, const Tables& tables, W sign, W eps) {
  const int64_t size = qkv.size(4), half = size / 2, turned = 2 * qkv.size(3);
  const Rows<const T> in = rows_of<T>(qkv);
  const Rows<T> to = writable_rows_of<T>(out);
  W* kept = static_cast<W*>(rstd);
  const W *cos = static_cast<const W*>(tables.cos), *sin = static_cast<const W*>(tables.sin);
  const bool copies = to.data != in.data;
  const auto one = size == 32   ? turn_row<T, W, kNorm, 32>
                   : size == 64 ? turn_row<T, W, kNorm, 64>
                   : size == 128 ? turn_row<T, W, kNorm, 128>
                                 : turn_row<T, W, kNorm, 0>;
  for_rows(qkv, [&](int64_t begin, int64_t end, int64_t length) {
    std::vector<W> unkept(kNorm && !kept ? turned : 0);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / length, position = row % length;
      const T* x = in.at(b, position);
      T* y = to.at(b, position);
      W* scales = kept ? kept + row * turned : unkept.data();
      one(y, scales, x, cos + position * half, sin + position * half, turned, size, sign, eps);
      if (copies) std::memcpy(y + turned * size, x + turned * size, sizeof(T) * turned / 2 * size);
    }
  });
}

template <typename T, typename W>
void turn_back(Tensor& dqkv, const Tensor& grad, const Tensor& out, const void* rstd, const Tables& tables) {
  const int64_t size = grad.size(4), half = size / 2, turned = 2 * grad.size(3);
  const Rows<const T> from = rows_of<T>(grad), at = rows_of<T>(out);
  const Rows<T> to = writable_rows_of<T>(dqkv);
  const W* kept = static_cast<const W*>(rstd);
  const W *cos = static_cast<const W*>(tables.cos), *sin = static_cast<const W*>(tables.sin);
  const auto one = size == 32   ? turn_row_back<T, W, 32>
                   : size == 64 ? turn_row_back<T, W, 64>
                   : size == 128 ? turn_row_back<T, W, 128>
                                 : turn_row_back<T, W, 0>;
  for_rows(grad, [&](int64_t begin, int64_t end, int64_t length) {
    std::vector<W> scratch(half + turned);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / length, position = row % length;
      const T* g = from.at(b, position);
      T* dx = to.at(b, position);
      one(dx, g, at.at(b, position), kept + row * turned, cos + position * half, sin + position * half, scratch.data(), turned,
          size);
      std::memcpy(dx + turned * size, g + turned * size, sizeof(T) * turned / 2 * size);
    }
  });
}

// The type that data is computed in.
ScalarType wide_type(const Tensor& qkv) {
  return qkv.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_packed(const Tensor& qkv, std::initializer_list<const Tensor*> others) {
  const ScalarType type = qkv.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16,
                  "rotary takes fp32, fp64 or bf16 on the CPU");
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3 && qkv.size(4) % 2 == 0, "rotary takes [B, L, 3, H, E], E even");
  const auto check = [&](const Tensor& packed) {
    STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == type && packed.dim() == 5, "rotary: out is not like qkv");
    for (int64_t i = 0; i < 5; ++i) STD_TORCH_CHECK(packed.size(i) == qkv.size(i), "rotary: out is not like qkv");
    STD_TORCH_CHECK(packed.numel() == 0 || (packed.stride(4) == 1 && packed.stride(2) == qkv.size(3) * qkv.size(4) &&
                                            (qkv.size(3) == 1 || packed.stride(3) == qkv.size(4))),
                    "rotary takes tensors that are dense in their last three dimensions");
  };
  check(qkv);
  for (const Tensor* packed : others) check(*packed);
}

// Tables [L, E / 2].
Tables read_tables(Reader& reader, const Tensor& qkv, const Tensor& cos, const Tensor& sin) {
  const int64_t elements = qkv.size(1) * (qkv.size(4) / 2);
  return {reader.read(cos, "cos", wide_type(qkv), elements), reader.read(sin, "sin", wide_type(qkv), elements)};
}

// Elements of reciprocal root-mean-squares [B, L, 2, H].
int64_t heads_of(const Tensor& qkv) { return qkv.size(0) * qkv.size(1) * 2 * qkv.size(3); }

template <bool kNorm>
void turn_any(Tensor& out, const std::optional<Tensor>& kept, const Tensor& qkv, const Tensor& cos, const Tensor& sin,
              double sign, double eps) {
  check_packed(qkv, {&out});
  Reader reader("rotary", qkv);
  const Tables tables = read_tables(reader, qkv, cos, sin);
  void* rstd = reader.in_place(kept, "rstd", wide_type(qkv), heads_of(qkv));
  if (qkv.numel() == 0) return;
  const float sign32 = static_cast<float>(sign), eps32 = static_cast<float>(eps);
  switch (qkv.scalar_type()) {
    case ScalarType::Double: return turn<double, double, kNorm>(out, rstd, qkv, tables, sign, eps);
    case ScalarType::Float: return turn<float, float, kNorm>(out, rstd, qkv, tables, sign32, eps32);
    default: return turn<Half, float, kNorm>(out, rstd, qkv, tables, sign32, eps32);
  }
}

void rotary(Tensor out, Tensor qkv, Tensor cos, Tensor sin, bool inverse) {
  turn_any<false>(out, std::nullopt, qkv, cos, sin, inverse ? -1.0 : 1.0, 0.0);
}

void rotary_normed(Tensor out, std::optional<Tensor> rstd, Tensor qkv, Tensor cos, Tensor sin, double eps) {
  turn_any<true>(out, rstd, qkv, cos, sin, 1.0, eps);
}

void rotary_normed_backward(Tensor dqkv, Tensor grad, Tensor out, Tensor rstd, Tensor cos, Tensor sin) {
  check_packed(grad, {&dqkv, &out});
  Reader reader("rotary", grad);
  const Tables tables = read_tables(reader, grad, cos, sin);
  const void* scales = reader.read(rstd, "rstd", wide_type(grad), heads_of(grad));
  if (grad.numel() == 0) return;
  switch (grad.scalar_type()) {
    case ScalarType::Double: return turn_back<double, double>(dqkv, grad, out, scales, tables);
    case ScalarType::Float: return turn_back<float, float>(dqkv, grad, out, scales, tables);
    default: return turn_back<Half, float>(dqkv, grad, out, scales, tables);
  }
}

}  // namespace
}  // namespace atat_fast

STABLE_TORCH_LIBRARY_IMPL(atat_fast_c, CPU, m) {
  m.impl("rotary", TORCH_BOX(&atat_fast::rotary));
  m.impl("rotary_normed", TORCH_BOX(&atat_fast::rotary_normed));
  m.impl("rotary_normed_backward", TORCH_BOX(&atat_fast::rotary_normed_backward));
}
