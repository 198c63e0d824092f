// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

struct __half2 {
  uint16_t x, y;
};

namespace emulator {

// max.NaN of a 16-bit format: NaN if one is, +0 above -0
inline uint16_t max_nan(uint16_t a, uint16_t b, int infinity) {
  if ((a & 0x7fff) > infinity || (b & 0x7fff) > infinity) return 0x7fff;
  const auto order = [](uint16_t bits) { return bits & 0x8000 ? -1 - (bits & 0x7fff) : bits; };
  return order(a) > order(b) ? a : b;
}

}  // namespace emulator

inline __half2 __hmax2_nan(__half2 a, __half2 b) {
  return {emulator::max_nan(a.x, b.x, 0x7c00), emulator::max_nan(a.y, b.y, 0x7c00)};
}
