// SPDX-License-Identifier: Apache-2.0
// The order of selection: value descending, NaN first, -0 == +0, then index ascending.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace mik {

// an integer that sorts as the value does
inline int32_t rank_key(float value) {
  if (value != value) return INT32_MAX;
  if (value == 0) return 0;
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits < 0 ? -(bits & INT32_MAX) : bits;
}

inline int64_t rank_key(double value) {
  if (value != value) return INT64_MAX;
  if (value == 0) return 0;
  int64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits < 0 ? -(bits & INT64_MAX) : bits;
}

}  // namespace mik
