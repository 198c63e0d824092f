// SPDX-License-Identifier: Apache-2.0
// A few weighted sums of the same rows, in registers; compiled once per level.

#if MIK_VECTOR_BYTES == 64
constexpr int kMixVectors = 4;  // 24 sums, 4 columns, 1 weight of 32 registers
#else
constexpr int kMixVectors = 2;  // 12 sums, 2 columns, 1 weight of 16
#endif

typedef float mix_floats __attribute__((vector_size(MIK_VECTOR_BYTES)));
typedef double mix_doubles __attribute__((vector_size(MIK_VECTOR_BYTES)));
template <class A>
struct mix_vector {
  using type = mix_floats;
};
template <>
struct mix_vector<double> {
  using type = mix_doubles;
};

template <class A>
static void mix_tile(const A* weights, const A* b, int64_t ldb, int64_t depth, A* out) {
  using V = typename mix_vector<A>::type;
  constexpr int64_t lanes = MIK_VECTOR_BYTES / sizeof(A), wide = kMixVectors * lanes;
  for (int64_t first = 0; first < kMixCols; first += wide) {
    V sums[kMixRows][kMixVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kMixRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kMixVectors; ++v) sums[r][v] = V{};
    for (int64_t k = 0; k < depth; ++k) {
      V columns[kMixVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kMixVectors; ++v)
        __builtin_memcpy(&columns[v], b + k * ldb + first + v * lanes, sizeof(V));
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
