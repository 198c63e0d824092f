// SPDX-License-Identifier: Apache-2.0
// Products of rows with rows, in register tiles; compiled once per level.
//
// Both operands run along the contraction, so neither is packed or transposed: a tile of rows is
// loaded as it lies, and the lanes of its sums are added up once at the end.

#include "cpu/simd/wide_body.h"

#if MIK_VECTOR_BYTES == 64
constexpr int kTileRows = 4, kTileCols = 6;  // 24 sums, 4 rows, 1 column of 32 registers
#elif MIK_VECTOR_BYTES == 32
constexpr int kTileRows = 3, kTileCols = 4;  // 12 sums, 3 rows, 1 column of 16
#else
constexpr int kTileRows = 2, kTileCols = 4;
#endif

// the sum of the lanes, by halves
template <class A, int N>
static inline A sum_lanes(const A* lanes) {
  if constexpr (N == 1) {
    return lanes[0];
  } else {
    A half[N / 2];
#pragma omp simd
    for (int i = 0; i < N / 2; ++i) half[i] = lanes[i] + lanes[i + N / 2];
    return sum_lanes<A, N / 2>(half);
  }
}

// acc[r][c] += <a[r], b[c]> over d numbers, for the first `rows` of kTileRows rows and N columns.
// With Ahead, the rows that are next are fetched alongside (edge scores at GPT-2's sizes: 10.5 ms
// without, 7.2 with; two Zen 4 cores)
template <class A, int N, bool Ahead>
static inline void dot_tile(const A* const* a, const A* const* ahead, const A* const* b, int64_t d,
                            int rows, double* acc, int64_t ld) {
  using V = typename wide<A>::type;
  constexpr int64_t lanes = MIK_VECTOR_BYTES / sizeof(A);
  V sums[kTileRows][N];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) sums[r][c] = V{};
  int64_t k = 0;
  for (; k + lanes <= d; k += lanes) {
    if constexpr (Ahead) {
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) __builtin_prefetch(ahead[r] + k);
    }
    V row[kTileRows];
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) row[r] = load_wide<V>(a[r] + k);
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) {
      const V column = load_wide<V>(b[c] + k);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) sums[r][c] += row[r] * column;
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < N; ++c) {
      A folded[lanes];
      __builtin_memcpy(folded, &sums[r][c], sizeof(folded));
      A total = sum_lanes<A, lanes>(folded);
      for (int64_t t = k; t < d; ++t) total += a[r][t] * b[c][t];
      acc[r * ld + c] += total;
    }
  }
}

// the first `cols` of kTileCols columns
template <class A, bool Ahead, int N = kTileCols>
static inline void some_columns(const A* const* a, const A* const* ahead, const A* const* b,
                                int64_t cols, int64_t d, int rows, double* acc, int64_t ld) {
  if constexpr (N > 1) {
    if (cols < N) return some_columns<A, Ahead, N - 1>(a, ahead, b, cols, d, rows, acc, ld);
  }
  dot_tile<A, N, Ahead>(a, ahead, b, d, rows, acc, ld);
}

// tiles without a pair below its limit are passed over, others are filled whole
template <class A>
static void block_products(const RowProducts<A>& of) {
  const auto [a, rows, b, cols, d, limits, first_row, acc, ld] = of;
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const int here = rows - i < kTileRows ? static_cast<int>(rows - i) : kTileRows;
    const A *row[kTileRows], *ahead[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      row[r] = a[i + (r < here ? r : here - 1)];
      ahead[r] = a[i + r + kTileRows < rows ? i + r + kTileRows : rows - 1];
    }
    for (int64_t j = 0; j < cols; j += kTileCols) {
      const int64_t across = cols - j < kTileCols ? cols - j : kTileCols;
      if (limits != nullptr) {
        bool any = false;
        for (int64_t c = 0; c < across; ++c) any = any || first_row + i < limits[j + c];
        if (!any) continue;
      }
      double* out = acc + i * ld + j;
      // one fetch per tile of rows is enough
      if (j == 0)
        some_columns<A, true>(row, ahead, b, across, d, here, out, ld);
      else
        some_columns<A, false>(row, ahead, b + j, across, d, here, out, ld);
    }
  }
}

template <class T, class A>
static void copy_row(const T* from, int64_t stride, const T* scale, int64_t scale_stride, int64_t d,
                     A* to) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) to[i] = static_cast<A>(from[i]);
  } else {
    for (int64_t i = 0; i < d; ++i) to[i] = static_cast<A>(from[i * stride]);
  }
  if (scale != nullptr)
    for (int64_t i = 0; i < d; ++i) to[i] *= static_cast<A>(scale[i * scale_stride]);
}
