// SPDX-License-Identifier: Apache-2.0
// Sums of numbers of any exponent without rounding: fixed point over all exponents of fp32, rounded
// once, to fp64, when asked.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/formats.h"

namespace mik::cuda {

// 2^253 is the place of fp32's largest exponent in units of its least number, and significands add
// up to less than 2^64
constexpr uint32_t LIMBS = (253 + 64 + 31) / 32;

// The sum of limbs[l] 2^(32 l). Limbs are 64 bits wide so that carries can wait.
struct ExactSum {
  uint64_t limbs[LIMBS];

  // units * 2^place, as far as it lies in limb l
  static __device__ uint32_t part(uint64_t units, uint32_t place, uint32_t l) {
    const int32_t from = static_cast<int32_t>(32 * l) - static_cast<int32_t>(place);
    if (from >= 64 || from <= -32) return 0;
    return static_cast<uint32_t>(from < 0 ? units << -from : units >> from);
  }
  __device__ void add(uint64_t units, uint32_t place) {
#pragma unroll
    for (uint32_t l = 0; l < LIMBS; ++l) limbs[l] += part(units, place, l);
  }
  // of something that was added before
  __device__ void subtract(uint64_t units, uint32_t place) {
#pragma unroll
    for (uint32_t l = 0; l < LIMBS; ++l) limbs[l] -= part(units, place, l);
  }

  // The nearest fp64 number, ties to even: the limb of the first one, the two below it, and
  // whether anything lies below those.
  __device__ double rounded() const {
    uint32_t top = 0, high = 0, middle = 0, low = 0;
    uint32_t last = 0, second = 0;
    bool rest = false, below = false;
    uint64_t carry = 0;
#pragma unroll
    for (uint32_t l = 0; l < LIMBS; ++l) {
      carry += limbs[l];
      const uint32_t limb = static_cast<uint32_t>(carry);
      carry >>= 32;
      if (limb != 0) top = l, high = limb, middle = last, low = second, rest = below;
      below |= second != 0;
      second = last, last = limb;
    }
    if (high == 0) return 0;
    const uint32_t zeros = __clz(static_cast<int>(high));
    const uint64_t under = static_cast<uint64_t>(low) << zeros;
    uint64_t bits = (static_cast<uint64_t>(high) << 32 | middle) << zeros | under >> 32;
    // 64 bits from the first one on: the last may stand for all that are left out
    bits |= rest || static_cast<uint32_t>(under) != 0;
    const int64_t exponent = 32 * static_cast<int64_t>(top) - 32 - zeros;
    // from 1 to 2^320: the exponent's field takes it
    return bits_as<double>(bits_as<int64_t>(static_cast<double>(bits)) + (exponent << 52));
  }
};

}  // namespace mik::cuda
