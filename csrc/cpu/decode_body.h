// SPDX-License-Identifier: Apache-2.0
// Weighted sums of gathered rows; compiled once per level.

#include "cpu/rows_body.h"

// y[n] = bias + sum_j values[n, j] w[indices[n, j]] for tokens begin..end; `sum` is [d] scratch,
// `rows` and `weights` are [k]
template <class T, class A>
static void decode_tokens(int64_t begin, int64_t end, int64_t k, int64_t d, const T* values,
                          const int64_t* indices, const T* w, int64_t ldw, const T* bias, T* y,
                          A* sum, const T** rows, A* weights) {
  for (int64_t n = begin; n < end; ++n) {
    int64_t active = 0;
    for (int64_t j = 0; j < k; ++j) {
      weights[active] = static_cast<A>(values[n * k + j]);
      rows[active] = w + indices[n * k + j] * ldw;
      active += weights[active] != A(0);
    }
    for (int64_t i = 0; i < d; ++i) sum[i] = A(0);
    add_rows(sum, d, rows, weights, active);
    T* out = y + n * d;
    if (bias != nullptr) {
      for (int64_t i = 0; i < d; ++i) out[i] = static_cast<T>(sum[i] + static_cast<A>(bias[i]));
    } else {
      for (int64_t i = 0; i < d; ++i) out[i] = static_cast<T>(sum[i]);
    }
  }
}
