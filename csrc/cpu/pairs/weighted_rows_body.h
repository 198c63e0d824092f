// SPDX-License-Identifier: Apache-2.0
// A few weighted sums of the same rows, in registers; compiled once per level.

#include "cpu/simd/wide_body.h"

#if MIK_VECTOR_BYTES == 64
constexpr int kSumVectors = 4;  // 24 sums, 4 columns, 1 weight of 32 registers
#else
constexpr int kSumVectors = 2;  // 12 sums, 2 columns, 1 weight of 16
#endif

// terms of one running sum: over all 529 of an edge_mix the error was 2.7 times that of parts
constexpr int64_t kSumDepth = 128;

template <class A>
static void weighted_rows(const A* weights, const A* b, int64_t ldb, int64_t depth, A* out,
                          int64_t ld) {
  using V = typename wide<A>::type;
  constexpr int64_t lanes = MIK_VECTOR_BYTES / sizeof(A), span = kSumVectors * lanes;
  for (int64_t part = 0; part == 0 || part < depth; part += kSumDepth)
    for (int64_t first = 0; first < kSumCols; first += span) {
      const int64_t last = part + kSumDepth < depth ? part + kSumDepth : depth;
      V sums[kSumRows][kSumVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kSumRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kSumVectors; ++v) sums[r][v] = V{};
      for (int64_t k = part; k < last; ++k) {
        V columns[kSumVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kSumVectors; ++v)
          columns[v] = load_wide<V>(b + k * ldb + first + v * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < kSumRows; ++r) {
          const A weight = weights[k * kSumRows + r];
#pragma GCC unroll 8
          for (int v = 0; v < kSumVectors; ++v) sums[r][v] += weight * columns[v];
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kSumRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kSumVectors; ++v) {
          A* to = out + r * ld + first + v * lanes;
          if (part > 0) sums[r][v] += load_wide<V>(to);
          __builtin_memcpy(to, &sums[r][v], sizeof(V));
        }
    }
}
