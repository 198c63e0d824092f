// SPDX-License-Identifier: Apache-2.0
// Weighted sums of gathered rows; compiled once per level.

#include "cpu/simd/rows_body.h"

// sum[i] = bias + sum_j values[j] w[indices[j]] over the slots of one token; `rows` and `weights`
// are scratch for as many
template <class T, class A>
static void decode_token(int64_t count, int64_t d, const T* values, const int64_t* indices, const T* w,
                         int64_t ldw, const T* bias, A* sum, const T** rows, A* weights) {
  int64_t active = 0;
  for (int64_t j = 0; j < count; ++j) {
    weights[active] = static_cast<A>(values[j]);
    rows[active] = w + indices[j] * ldw;
    active += weights[active] != A(0);
  }
  for (int64_t i = 0; i < d; ++i) sum[i] = A(0);
  add_rows(sum, d, rows, weights, active);
  if (bias != nullptr)
    for (int64_t i = 0; i < d; ++i) sum[i] += static_cast<A>(bias[i]);
}

// y[n] for tokens begin..end; `sum` is [d] scratch
template <class T, class A, class Owned>
static void decode_tokens(int64_t begin, int64_t end, Owned owned, int64_t d, const T* values,
                          const int64_t* indices, const T* w, int64_t ldw, const T* bias, T* y,
                          A* sum, const T** rows, A* weights) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t first = owned.begin(n), count = owned.end(n) - first;
    decode_token(count, d, values + first, indices + first, w, ldw, bias, sum, rows, weights);
    T* out = y + n * d;
    for (int64_t i = 0; i < d; ++i) out[i] = static_cast<T>(sum[i]);
  }
}

// error[n] = y[n] - x[n] and its square's sum, which is taken in 16 interleaved parts
template <class T, class A, class Owned>
static void decode_errors(int64_t begin, int64_t end, Owned owned, int64_t d, const T* values,
                          const int64_t* indices, const T* w, int64_t ldw, const T* bias,
                          const A* x, int64_t ldx, A* error, A* squares, const T** rows,
                          A* weights) {
  for (int64_t n = begin; n < end; ++n) {
    A* out = error + n * d;
    const int64_t first = owned.begin(n), count = owned.end(n) - first;
    decode_token(count, d, values + first, indices + first, w, ldw, bias, out, rows, weights);
    const A* row = x + n * ldx;
    A parts[16] = {};
    int64_t i = 0;
    for (; i + 16 <= d; i += 16)
      for (int64_t lane = 0; lane < 16; ++lane) {
        out[i + lane] -= row[i + lane];
        parts[lane] += out[i + lane] * out[i + lane];
      }
    A total = A(0);
    for (; i < d; ++i) {
      out[i] -= row[i];
      total += out[i] * out[i];
    }
    for (int64_t lane = 0; lane < 16; ++lane) total += parts[lane];
    squares[n] = total;
  }
}
