// SPDX-License-Identifier: Apache-2.0
// A few weighted sums of the same rows, in registers; compiled once per level.

#include "cpu/wide_body.h"

#if MIK_VECTOR_BYTES == 64
constexpr int kMixVectors = 4;  // 24 sums, 4 columns, 1 weight of 32 registers
#else
constexpr int kMixVectors = 2;  // 12 sums, 2 columns, 1 weight of 16
#endif

// a running sum of 529 numbers lost 2.7 times what a product in parts does
constexpr int64_t kMixDepth = 128;

template <class A>
static void mix_tile(const A* weights, const A* b, int64_t ldb, int64_t depth, A* out) {
  using V = typename wide<A>::type;
  constexpr int64_t lanes = MIK_VECTOR_BYTES / sizeof(A), span = kMixVectors * lanes;
  for (int i = 0; i < kMixRows * kMixCols; ++i) out[i] = A(0);
  for (int64_t part = 0; part < depth; part += kMixDepth)
    for (int64_t first = 0; first < kMixCols; first += span) {
      const int64_t last = part + kMixDepth < depth ? part + kMixDepth : depth;
      V sums[kMixRows][kMixVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kMixRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kMixVectors; ++v) sums[r][v] = V{};
      for (int64_t k = part; k < last; ++k) {
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
        for (int v = 0; v < kMixVectors; ++v) {
          A* to = out + r * kMixCols + first + v * lanes;
          sums[r][v] += load_wide<V>(to);
          __builtin_memcpy(to, &sums[r][v], sizeof(V));
        }
    }
}
