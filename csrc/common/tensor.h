// torch's tensors, and the checks of every op's arguments. All is in unnamed namespaces: torch's tensor classes have hidden
// visibility in each file, so functions that take them must have it too.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "bfloat16.h"

namespace atat_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

template <typename T>
constexpr ScalarType kTypeOf = ScalarType::Undefined;
template <>
constexpr ScalarType kTypeOf<float> = ScalarType::Float;
template <>
constexpr ScalarType kTypeOf<double> = ScalarType::Double;
template <>
constexpr ScalarType kTypeOf<Half> = ScalarType::BFloat16;
template <>
constexpr ScalarType kTypeOf<int64_t> = ScalarType::Long;
template <>
constexpr ScalarType kTypeOf<uint8_t> = ScalarType::Bool;  // a byte that is 0 or 1

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

// Whether it is bf16; the only other choice is fp32.
inline bool is_half(const char* op, ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, op, " takes float32 and bfloat16, got ",
                  name_of(type));
  return type == ScalarType::BFloat16;
}

// Whether 16 bytes can be read or written here at once. Null, for a tensor that was not given, counts.
inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Reads the tensors of one call of `op`, which must be on the device of the first. Copies live as long as the reader.
class Reader {
 public:
  Reader(const char* op, const Tensor& first)
      : op_(op), on_cpu_(first.is_cpu()), device_(on_cpu_ ? 0 : first.get_device_index()) {}

  void check(const Tensor& given, const char* name, ScalarType type, int64_t elements) const {
    STD_TORCH_CHECK(given.scalar_type() == type && given.numel() == elements, op_, ": ", name, " has ", given.numel(),
                    " elements of ", name_of(given.scalar_type()), "; it must have ", elements, " of ", name_of(type));
    STD_TORCH_CHECK(given.is_cpu() == on_cpu_ && (on_cpu_ || given.get_device_index() == device_), op_, ": ", name,
                    " lies on another device than the first tensor");
  }

  // The elements, contiguous: copied if they are not.
  const void* read(const Tensor& given, const char* name, ScalarType type, int64_t elements) {
    check(given, name, type, elements);
    if (given.is_contiguous()) return given.const_data_ptr();
    return copies_.emplace_back(torch::stable::contiguous(given)).const_data_ptr();
  }

  template <typename T>
  const T* read(const Tensor& given, const char* name, int64_t elements) {
    return static_cast<const T*>(read(given, name, kTypeOf<T>, elements));
  }

  // Null if it is not given.
  template <typename T>
  const T* read(const std::optional<Tensor>& given, const char* name, int64_t elements) {
    return given ? read<T>(*given, name, elements) : nullptr;
  }

  // The elements in place, which must be contiguous: for outputs, and for tensors too large to copy.
  void* in_place(const Tensor& given, const char* name, ScalarType type, int64_t elements) const {
    check(given, name, type, elements);
    STD_TORCH_CHECK(given.is_contiguous(), op_, ": ", name, " must be contiguous");
    return given.mutable_data_ptr();
  }

  void* in_place(const std::optional<Tensor>& given, const char* name, ScalarType type, int64_t elements) const {
    return given ? in_place(*given, name, type, elements) : nullptr;
  }

  template <typename T, typename Given>
  T* in_place(const Given& given, const char* name, int64_t elements) const {
    return static_cast<T*>(in_place(given, name, kTypeOf<T>, elements));
  }

 private:
  const char* op_;
  bool on_cpu_;
  int32_t device_;  // of a GPU
  std::vector<Tensor> copies_;
};

}  // namespace
}  // namespace atat_fast
