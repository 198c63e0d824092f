// SPDX-License-Identifier: Apache-2.0
// Element types, and the type that their sums run in.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace mik {

// fp32 for the low precisions, the type itself otherwise
template <class T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename accumulator<T>::type;

}  // namespace mik
