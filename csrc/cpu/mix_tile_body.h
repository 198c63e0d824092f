// SPDX-License-Identifier: Apache-2.0
// A few weighted sums of the same rows, in registers; compiled once per level.

#include "cpu/wide_body.h"

#if MIK_VECTOR_BYTES == 64
constexpr int kMixVectors = 4;  // 24 sums, 4 columns, 1 weight of 32 registers
#else
constexpr int kMixVectors = 2;  // 12 sums, 2 columns, 1 weight of 16
#endif

template <class A>
static void mix_tile(const A* weights, const A* b, int64_t ldb, int64_t depth, A* out) {
  using V = typename wide<A>::type;
  constexpr int64_t lanes = MIK_VECTOR_BYTES / sizeof(A), span = kMixVectors * lanes;
  for (int64_t first = 0; first < kMixCols; first += span) {
    V sums[kMixRows][kMixVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kMixRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kMixVectors; ++v) sums[r][v] = V{};
    for (int64_t k = 0; k < depth; ++k) {
      V columns[kMixVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kMixVectors; ++v)
        columns[v] = load_wide<V>(b + k * ldb + first + v * lanes);
#pragma GCC unroll 8
      for (int r = 0; r < kMixRows; ++r) {
        const A weight = weights[k * kMixRows + r];
#pragma GCC unroll 8
        for (int v = 0; v < kMixVectors; ++v) sums[r][v] += weight * columns[v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kMixRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kMixVectors; ++v)
        __builtin_memcpy(out + r * kMixCols + first + v * lanes, &sums[r][v], sizeof(V));
  }
}
