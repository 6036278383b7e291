// adaptive_layer_norm and gated_residual_norm on the CPU. Memory bounds them, so a row is read from memory once and written once;
// later passes over it (mean, variance, output) find it in the first-level cache. A row's conditioning is widened to fp32 once a
// task. In a backward each task sums its rows into partials [K, width], and a second stage adds those up in a fixed order.

#include "../common/lanes.h"
#include "../common/rows.h"
#include "op.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <type_traits>

namespace atat_fast {
namespace {

// A thread gets tasks of at least this many elements: for fewer, waking it takes longer than the work.
constexpr int64_t kElementsPerThread = 1 << 15;
// Columns that the second stage adds up at a time.
constexpr int64_t kColumns = 256;

// Four stores, one for each word: as a loop they would not be vectorised.
ATAT_FAST_VECTORISED void fill_keep(float* keep, int64_t counters, uint64_t first, const Dropout& dropout) {
  const uint64_t seed = dropout.seed;
  const uint32_t step = dropout.step, stream = dropout.stream, largest_dropped = dropout.largest_dropped;
  const float scale = dropout.scale;
  for (int64_t i = 0; i < counters; ++i) {
    const PhiloxWords four = random_words(first + static_cast<uint64_t>(i), seed, step, stream);
    keep[4 * i] = four.word[0] > largest_dropped ? scale : 0.0f;
    keep[4 * i + 1] = four.word[1] > largest_dropped ? scale : 0.0f;
    keep[4 * i + 2] = four.word[2] > largest_dropped ? scale : 0.0f;
    keep[4 * i + 3] = four.word[3] > largest_dropped ? scale : 0.0f;
  }
}

ATAT_FAST_VECTORISED void multiply(float* out, const float* a, const float* b, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = a[i] * b[i];
}

ATAT_FAST_VECTORISED void make_gain(float* gain, const float* weight, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) gain[i] = (1.0f + gain[i]) * weight[i];
}

// Row `group` of conditioning, or a weight, in fp32.
void load(float* out, const Values& values, int64_t offset, int64_t count) {
  if (values.half) {
    widen_row(out, static_cast<const Half*>(values.data) + offset, count);
  } else {
    std::copy_n(static_cast<const float*>(values.data) + offset, count, out);
  }
}

void load(float* out, const Conditioning& rows, int64_t group, int64_t count) {
  load(out, rows.values, group * rows.stride, count);
}

// Rows that go through each pass together: a pass ends in a few dependent operations, and the next row can begin meanwhile. The
// block stays in the first-level cache.
constexpr int64_t kMostRows = 8;
inline int64_t block_rows(int64_t width) { return std::min(kMostRows, std::max<int64_t>(1, 2048 / width)); }

// Working memory of one thread: fp32 rows that begin on cache lines of their own.
class Scratch {
  int64_t width_, pitch_;
  std::unique_ptr<float[]> memory_;
  float* begin_;

 public:
  explicit Scratch(int64_t width)
      : width_(width),
        pitch_((width + 3 + 15) / 16 * 16),  // dropout is made by fours
        memory_(new float[(6 + block_rows(width)) * pitch_ + 16]),
        begin_(reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64)) {
    std::fill_n(zeros, width, 0.0f);
  }

  // The conditioning that a task's rows share.
  void condition(const NormArguments& a, int64_t group) {
    load(gain, a.scale, group, width_);
    if (a.weight.data != nullptr) {
      load(row(0), a.weight, 0, width_);
    } else {
      std::fill_n(row(0), width_, 1.0f);
    }
    make_gain(gain, row(0), width_);
    if (a.shift.values.data != nullptr) load(shift, a.shift, group, width_);
    if (!a.gated) return;
    load(gate, a.gate, group, width_);
    std::copy_n(gate, width_, factor);
    std::fill_n(keep, width_, 1.0f);
  }

  // Dropout of row r of [batch * length], in `keep`, and what the branch is multiplied by there, in `factor`.
  void drop(const NormArguments& a, int64_t r) {
    if (!a.dropout.on) return;
    const int64_t id = a.dropout.sample_ids[r / a.length];
    fill_keep(keep, (width_ + 3) / 4, first_counter(id, r % a.length, a.length, width_), a.dropout);
    multiply(factor, gate, keep, width_);
  }

  // Row k of a block.
  float* row(int64_t k) const { return begin_ + (6 + k) * pitch_; }

  float *const gain = begin_, *const shift = begin_ + pitch_, *const gate = begin_ + 2 * pitch_;
  float *const factor = begin_ + 3 * pitch_, *const keep = begin_ + 4 * pitch_, *const zeros = begin_ + 5 * pitch_;
};

// Rows first to last, at most block_rows of them.
template <typename Stream, typename Branch, typename Out>
ATAT_FAST_VECTORISED void forward_rows(const ForwardArguments& a, int64_t first, int64_t last, Scratch& scratch) {
  const int64_t width = a.width;
  const float inverse = 1.0f / static_cast<float>(width);
  const float *gain = scratch.gain, *shift = scratch.shift, *factor = scratch.factor;
  const auto* stream = static_cast<const Stream*>(a.stream.data);
  const auto* branches = static_cast<const Branch*>(a.branch.data);
  auto* totals = static_cast<Stream*>(a.total);
  float *means = a.mean, *rstds = a.rstd;

  // Later passes read an fp32 stream in place, and a bf16 stream before it is rounded.
  constexpr bool kWide = std::is_same<Stream, float>::value;
  const auto row_of = [&](int64_t r) -> const float* {
    if constexpr (kWide) return (a.gated ? totals : stream) + r * width;
    return scratch.row(r - first);
  };
  for (int64_t r = first; r < last; ++r) {
    const Stream* x = stream + r * width;
    float* row = scratch.row(r - first);
    if (a.gated) {
      scratch.drop(a, r);
      const Branch* branch = branches + r * width;
      Stream* total = totals + r * width;
      means[r] = inverse * sum(width, [&](int64_t i) __attribute__((always_inline)) {
                   const float t = widened(x[i]) + factor[i] * widened(branch[i]);
                   narrow(total[i], t);
                   if constexpr (!kWide) row[i] = t;
                   return t;
                 });
    } else {
      means[r] = inverse * sum(width, [&](int64_t i) __attribute__((always_inline)) {
                   const float t = widened(x[i]);
                   if constexpr (!kWide) row[i] = t;
                   return t;
                 });
    }
  }
  for (int64_t r = first; r < last; ++r) {
    const float* row = row_of(r);
    const float mean = means[r];
    const float variance = inverse * sum(width, [&](int64_t i) __attribute__((always_inline)) {
                             const float apart = row[i] - mean;
                             return apart * apart;
                           });
    rstds[r] = 1.0f / std::sqrt(variance + a.eps);
  }
  for (int64_t r = first; r < last; ++r) {
    const float* row = row_of(r);
    const float mean = means[r], rstd = rstds[r];
    Out* y = static_cast<Out*>(a.y) + r * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) narrow(y[i], (row[i] - mean) * rstd * gain[i] + shift[i]);
  }
}

// Rows first to last, at most block_rows of them. `partials` holds the sums of dy, of dy * normed and of the gate's gradient.
template <typename Stream, typename Branch, typename Out>
ATAT_FAST_VECTORISED void backward_rows(const BackwardArguments& a, int64_t first, int64_t last, Scratch& scratch,
                                        float* partials) {
  const int64_t width = a.width;
  const float inverse = 1.0f / static_cast<float>(width);
  const float *gain = scratch.gain, *factor = scratch.factor, *keep = scratch.keep;
  float *shift_sum = partials, *full_sum = partials + width, *gate_sum = partials + 2 * width;
  const auto* zeros = scratch.zeros;
  const auto dy_of = [&](int64_t r) {
    return a.dy.data == nullptr ? reinterpret_cast<const Out*>(zeros) : static_cast<const Out*>(a.dy.data) + r * width;
  };
  Pair means[kMostRows];
  for (int64_t r = first; r < last; ++r) {
    const Stream* x = static_cast<const Stream*>(a.stream.data) + r * width;
    const Out* dy = dy_of(r);
    const float mean = a.mean[r], rstd = a.rstd[r];
    const Pair sums = sum_pairs(width, [&](int64_t i) __attribute__((always_inline)) {
      const float d = widened(dy[i]), along = d * ((widened(x[i]) - mean) * rstd);
      shift_sum[i] += d;
      full_sum[i] += along;
      return Pair{d * gain[i], along * gain[i]};
    });
    means[r - first] = {sums.first * inverse, sums.second * inverse};
  }
  for (int64_t r = first; r < last; ++r) {
    const Stream* x = static_cast<const Stream*>(a.stream.data) + r * width;
    const Out* dy = dy_of(r);
    const float mean = a.mean[r], rstd = a.rstd[r], plain = means[r - first].first, along = means[r - first].second;
    Stream* dstream = static_cast<Stream*>(a.dstream) + r * width;
    if (!a.gated) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const float normed = (widened(x[i]) - mean) * rstd;
        narrow(dstream[i], rstd * (widened(dy[i]) * gain[i] - plain - normed * along));
      }
      continue;
    }
    scratch.drop(a, r);
    const Branch* branch = static_cast<const Branch*>(a.branch.data) + r * width;
    const auto* dtotal = reinterpret_cast<const Stream*>(zeros);
    if (a.dtotal.data != nullptr) dtotal = static_cast<const Stream*>(a.dtotal.data) + r * width;
    Branch* dbranch = static_cast<Branch*>(a.dbranch) + r * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float normed = (widened(x[i]) - mean) * rstd;
      const float d = rstd * (widened(dy[i]) * gain[i] - plain - normed * along) + widened(dtotal[i]);
      narrow(dstream[i], d);
      narrow(dbranch[i], d * factor[i]);
      gate_sum[i] += d * (keep[i] * widened(branch[i]));
    }
  }
}

// Calls f with the types of the stream, the branch and y.
template <typename F>
void with_types(bool stream, bool branch, bool out, const F& f) {
  const auto with = [](bool half, const auto& g) { half ? g(Half{}) : g(float{}); };
  with(stream, [&](auto s) { with(branch, [&](auto b) { with(out, [&](auto o) { f(s, b, o); }); }); });
}

// Calls body(task, first, last, scratch) for every block of rows of every task, a task's blocks in order.
template <typename Body>
void for_tasks(const NormArguments& a, const Tasks& tasks, const Body& body) {
  const int64_t elements = std::max<int64_t>(1, tasks.rows * a.width / tasks.splits), block = block_rows(a.width);
  torch::stable::parallel_for(0, tasks.count, (kElementsPerThread + elements - 1) / elements, [&](int64_t first, int64_t last) {
    Scratch scratch(a.width);
    for (int64_t task = first; task < last; ++task) {
      if (task == first || tasks.group(task) != tasks.group(task - 1)) scratch.condition(a, tasks.group(task));
      const int64_t end = tasks.end(task);
      for (int64_t r = tasks.begin(task); r < end; r += block) body(task, r, std::min(r + block, end), scratch);
    }
  });
}

void forward(const ForwardArguments& a) {
  const Tasks tasks = cut(a.batch, a.length, a.groups);
  with_types(a.stream.half, a.branch.half, a.half_y, [&](auto s, auto b, auto o) {
    for_tasks(a, tasks, [&](int64_t, int64_t first, int64_t last, Scratch& scratch) {
      forward_rows<decltype(s), decltype(b), decltype(o)>(a, first, last, scratch);
    });
  });
}

void store(void* out, bool half, int64_t offset, const float* values, int64_t count) {
  if (half) {
    narrow_row(static_cast<Half*>(out) + offset, values, count);
  } else {
    std::copy_n(values, count, static_cast<float*>(out) + offset);
  }
}

// Columns start to start + count of all gradients that are sums over rows, from the tasks' partials [task, K, width].
void add_partials(const BackwardArguments& a, const Tasks& tasks, const float* partials, int64_t sums, int64_t start,
                  int64_t count) {
  float total[kColumns], weight[kColumns], scale[kColumns], weight_total[kColumns];
  std::fill_n(weight_total, count, 0.0f);
  if (a.weight.data != nullptr) load(weight, a.weight, start, count);
  for (int64_t group = 0; group < a.groups; ++group) {
    const auto add_up = [&](int64_t k) {
      std::fill_n(total, count, 0.0f);
      for (int64_t task = group * tasks.splits; task < (group + 1) * tasks.splits; ++task) {
        add_row(total, partials + (task * sums + k) * a.width + start, count);
      }
    };
    const int64_t offset = group * a.width + start;
    add_up(0);
    store(a.dshift, a.half_dshift, offset, total, count);
    add_up(1);
    if (a.weight.data != nullptr) {
      load(scale, a.scale.values, group * a.scale.stride + start, count);
      for (int64_t i = 0; i < count; ++i) weight_total[i] += total[i] * (1.0f + scale[i]);
      for (int64_t i = 0; i < count; ++i) total[i] *= weight[i];
    }
    store(a.dscale, a.half_dscale, offset, total, count);
    if (!a.gated) continue;
    add_up(2);
    store(a.dgate, a.half_dgate, offset, total, count);
  }
  if (a.weight.data != nullptr) store(a.dweight, a.half_dweight, start, weight_total, count);
}

void backward(const BackwardArguments& a) {
  const Tasks tasks = cut(a.batch, a.length, a.groups);
  const int64_t sums = a.gated ? 3 : 2, size = sums * a.width;
  const std::unique_ptr<float[]> partials(new float[tasks.count * size]());
  with_types(a.stream.half, a.branch.half, a.dy.half, [&](auto s, auto b, auto o) {
    for_tasks(a, tasks, [&](int64_t task, int64_t first, int64_t last, Scratch& scratch) {
      backward_rows<decltype(s), decltype(b), decltype(o)>(a, first, last, scratch, partials.get() + task * size);
    });
  });
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (std::max<int64_t>(1, tasks.count) * sums * kColumns));
  torch::stable::parallel_for(0, (a.width + kColumns - 1) / kColumns, grain, [&](int64_t first, int64_t last) {
    for (int64_t start = first * kColumns; start < std::min(last * kColumns, a.width); start += kColumns) {
      add_partials(a, tasks, partials.get(), sums, start, std::min(kColumns, a.width - start));
    }
  });
}

// The arguments that both ops and both directions share.
void fill(NormArguments& a, NormCall& call, bool gated, const Tensor& stream, const Tensor& scale,
          const std::optional<Tensor>& weight) {
  a.gated = gated;
  a.batch = call.batch;
  a.length = call.length;
  a.width = call.width;
  a.groups = call.groups;
  a.stream = call.values(stream, "stream", stream.numel());
  a.scale = call.rows(scale, "scale");
  a.weight = call.values(weight, "weight", call.width);
}

std::tuple<Tensor, Tensor, Tensor> adaptive_layer_norm(Tensor x, Tensor shift, Tensor scale, std::optional<Tensor> weight,
                                                       double eps, ScalarType out_type) {
  NormCall call(x, scale);
  ForwardArguments a{};
  fill(a, call, false, x, scale, weight);
  Tensor y = call.dense(out_type), mean = call.new_statistic(), rstd = call.new_statistic();
  a.shift = call.rows(shift, "shift");
  a.eps = static_cast<float>(eps);
  a.y = y.mutable_data_ptr();
  a.half_y = is_half(kOp, out_type);
  a.mean = mean.mutable_data_ptr<float>();
  a.rstd = rstd.mutable_data_ptr<float>();
  forward(a);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_norm(
    Tensor residual, Tensor branch, Tensor gate, Tensor shift, Tensor scale, std::optional<Tensor> weight, double dropout,
    std::optional<Tensor> seed, std::optional<Tensor> step, std::optional<Tensor> sample_ids, int64_t stream, double eps,
    ScalarType out_type) {
  NormCall call(residual, scale);
  ForwardArguments a{};
  fill(a, call, true, residual, scale, weight);
  Tensor total = call.dense(residual.scalar_type()), y = call.dense(out_type);
  Tensor mean = call.new_statistic(), rstd = call.new_statistic();
  a.branch = call.values(branch, "branch", residual.numel());
  a.gate = call.rows(gate, "gate");
  a.shift = call.rows(shift, "shift");
  a.dropout = call.dropout(dropout, seed, step, sample_ids, stream);
  a.eps = static_cast<float>(eps);
  a.total = total.mutable_data_ptr();
  a.y = y.mutable_data_ptr();
  a.half_y = is_half(kOp, out_type);
  a.mean = mean.mutable_data_ptr<float>();
  a.rstd = rstd.mutable_data_ptr<float>();
  forward(a);
  return {total, y, mean, rstd};
}

// Gradients of shift, scale and weight; the last is empty without a weight.
std::tuple<Tensor, Tensor, Tensor> conditioning_gradients(BackwardArguments& a, const NormCall& call, const Tensor& scale,
                                                          const std::optional<Tensor>& weight, ScalarType shift_type) {
  Tensor dshift = call.row_gradient(shift_type), dscale = call.row_gradient(scale.scalar_type());
  Tensor dweight = call.weight_gradient((weight ? *weight : scale).scalar_type(), weight.has_value());
  a.dshift = dshift.mutable_data_ptr();
  a.half_dshift = is_half(kOp, shift_type);
  a.dscale = dscale.mutable_data_ptr();
  a.half_dscale = a.scale.values.half;
  a.dweight = dweight.mutable_data_ptr();
  a.half_dweight = a.weight.half;
  return {dshift, dscale, dweight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> adaptive_layer_norm_backward(
    Tensor dy, Tensor x, Tensor scale, std::optional<Tensor> weight, Tensor mean, Tensor rstd, ScalarType shift_type) {
  NormCall call(x, scale);
  BackwardArguments a{};
  fill(a, call, false, x, scale, weight);
  a.dy = call.values(dy, "dy", x.numel());
  a.mean = call.statistic(mean, "mean");
  a.rstd = call.statistic(rstd, "rstd");
  Tensor dx = call.dense(x.scalar_type());
  a.dstream = dx.mutable_data_ptr();
  const auto [dshift, dscale, dweight] = conditioning_gradients(a, call, scale, weight, shift_type);
  backward(a);
  return {dx, dshift, dscale, dweight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_norm_backward(
    std::optional<Tensor> dtotal, std::optional<Tensor> dy, Tensor total, Tensor branch, Tensor gate, Tensor scale,
    std::optional<Tensor> weight, Tensor mean, Tensor rstd, double dropout, std::optional<Tensor> seed,
    std::optional<Tensor> step, std::optional<Tensor> sample_ids, int64_t stream, ScalarType shift_type) {
  NormCall call(total, scale);
  BackwardArguments a{};
  fill(a, call, true, total, scale, weight);
  a.branch = call.values(branch, "branch", total.numel());
  a.gate = call.rows(gate, "gate");
  a.dropout = call.dropout(dropout, seed, step, sample_ids, stream);
  a.dy = call.values(dy, "dy", total.numel());
  a.dtotal = call.values(dtotal, "dtotal", total.numel());
  STD_TORCH_CHECK(a.dtotal.data == nullptr || a.dtotal.half == a.stream.half, "dtotal has the stream's dtype");
  a.mean = call.statistic(mean, "mean");
  a.rstd = call.statistic(rstd, "rstd");
  Tensor dresidual = call.dense(total.scalar_type()), dbranch = call.dense(branch.scalar_type());
  Tensor dgate = call.row_gradient(gate.scalar_type());
  a.dstream = dresidual.mutable_data_ptr();
  a.dbranch = dbranch.mutable_data_ptr();
  a.dgate = dgate.mutable_data_ptr();
  a.half_dgate = a.gate.values.half;
  const auto [dshift, dscale, dweight] = conditioning_gradients(a, call, scale, weight, shift_type);
  backward(a);
  return {dresidual, dbranch, dgate, dshift, dscale, dweight};
}

}  // namespace
}  // namespace atat_fast

STABLE_TORCH_LIBRARY_IMPL(atat_fast_c, CPU, m) {
  m.impl("adaptive_layer_norm", TORCH_BOX(&atat_fast::adaptive_layer_norm));
  m.impl("adaptive_layer_norm_backward", TORCH_BOX(&atat_fast::adaptive_layer_norm_backward));
  m.impl("gated_residual_norm", TORCH_BOX(&atat_fast::gated_residual_norm));
  m.impl("gated_residual_norm_backward", TORCH_BOX(&atat_fast::gated_residual_norm_backward));
}
