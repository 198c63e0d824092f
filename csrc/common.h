// SPDX-License-Identifier: Apache-2.0
// Torch glue: registration, checks, dtype dispatch, parallel loops. The only file that knows
// torch's warts.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

// The operators' namespace is a parameter of the build (setup.py, build.toml), so that several
// builds live in one process. Two steps, for the macro to be expanded.
#ifndef MIK_NAMESPACE
#error "MIK_NAMESPACE: expected the operators' namespace, such as -DMIK_NAMESPACE=mikernels"
#endif
#define MIK_DEFINE_IN(NAMESPACE, m) STABLE_TORCH_LIBRARY_FRAGMENT(NAMESPACE, m)
#define MIK_REGISTER_IN(NAMESPACE, KEY, m) STABLE_TORCH_LIBRARY_IMPL(NAMESPACE, KEY, m)
#define MIK_DEFINE(m) MIK_DEFINE_IN(MIK_NAMESPACE, m)
#define MIK_REGISTER(KEY, m) MIK_REGISTER_IN(MIK_NAMESPACE, KEY, m)

namespace mik {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Python validates what people pass; these guard memory against direct calls of the raw operators
inline void check(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(message);
}

inline bool is_strided_row_major(const Tensor& t) { return t.dim() == 2 && t.stride(1) == 1; }

// a tensor whose last dimension is dense; copies only when it has to
inline Tensor dense_rows(const Tensor& t) {
  return t.dim() == 0 || t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1
             ? t
             : torch::stable::contiguous(t);
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                    std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, sizes, dtype);
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}
template <class T>
const T* data_or_null(const OptionalTensor& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// f(begin, end) over disjoint ranges; an exception in a worker is rethrown here, since it must not
// cross libtorch's C boundary
template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  std::atomic<bool> failed{false};
  std::string what;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      f(begin, end);
    } catch (const std::exception& error) {
      if (!failed.exchange(true)) what = error.what();
    }
  });
  if (failed) throw std::runtime_error(what);
}

#define MIK_DISPATCH_CASE(ENUM, TYPE, ...)    \
  case torch::headeronly::ScalarType::ENUM: { \
    using scalar_t = TYPE;                    \
    __VA_ARGS__();                            \
    break;                                    \
  }

// runs the lambda with scalar_t bound to the tensor's floating type
#define MIK_DISPATCH_FLOATING(TENSOR, ...)                                        \
  switch ((TENSOR).scalar_type()) {                                               \
    MIK_DISPATCH_CASE(Float, float, __VA_ARGS__)                                  \
    MIK_DISPATCH_CASE(Double, double, __VA_ARGS__)                                \
    MIK_DISPATCH_CASE(BFloat16, torch::headeronly::BFloat16, __VA_ARGS__)         \
    MIK_DISPATCH_CASE(Half, torch::headeronly::Half, __VA_ARGS__)                 \
    default:                                                                      \
      throw std::runtime_error("expected float32, float64, bfloat16 or float16"); \
  }

}  // namespace mik
