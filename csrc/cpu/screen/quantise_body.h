// SPDX-License-Identifier: Apache-2.0
// Rounding of rows to 16 bits, and products that are not rounded; compiled once per level.

#include "cpu/simd/wide_body.h"

typedef float half_floats __attribute__((vector_size(MIK_VECTOR_BYTES / 2)));
constexpr int kDoubles = MIK_VECTOR_BYTES / 8;

template <class W>
static inline wide_doubles load_doubles(const W* at) {
  half_floats narrow;
  if constexpr (sizeof(W) == sizeof(double)) {
    return load_wide<wide_doubles>(at);
  } else if constexpr (sizeof(W) == sizeof(float)) {
    __builtin_memcpy(&narrow, at, sizeof(narrow));
  } else {
    for (int l = 0; l < kDoubles; ++l) narrow[l] = static_cast<float>(at[l]);
  }
  return __builtin_convertvector(narrow, wide_doubles);
}

// out[r] = <x, w[r]> in fp64 with a fixed order of 16 sums: products of two fp32 numbers are exact
// in fp64, so every level returns the same bits
template <int R, class X, class W>
static inline void dot_rows(const X* x, const W* const* w, int64_t d, double* out) {
  constexpr int vectors = 16 / kDoubles;
  wide_doubles sums[R][vectors] = {};
  int64_t i = 0;
  for (; i + 16 <= d; i += 16) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const wide_doubles part = load_doubles(x + i + v * kDoubles);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][v] += part * load_doubles(w[r] + i + v * kDoubles);
    }
  }
  for (int r = 0; r < R; ++r) {
    double lane_sums[16];
    __builtin_memcpy(lane_sums, sums[r], sizeof(lane_sums));
    for (int64_t j = 0; i + j < d; ++j)
      lane_sums[j] +=
          static_cast<double>(x[i + j]) * static_cast<double>(static_cast<float>(w[r][i + j]));
    for (int width = 8; width > 0; width /= 2)
      for (int j = 0; j < width; ++j) lane_sums[j] += lane_sums[j + width];
    out[r] = lane_sums[0];
  }
}

template <class W>
static double exact_dot(const double* x, const W* w, int64_t d) {
  double dot;
  dot_rows<1>(x, &w, d, &dot);
  return dot;
}

// rows at a time: 8 sums hide the latency of the multiply-add
template <class X, class W>
static void exact_dots_of(const X* x, const W* const* w, int64_t count, int64_t d, double* out) {
  constexpr int rows = kDoubles / 2;
  int64_t r = 0;
  for (; r + rows <= count; r += rows) dot_rows<rows>(x, w + r, d, out + r);
  for (; r < count; ++r) dot_rows<1>(x, w + r, d, out + r);
}

// row = scale * q + error with 16-bit q; returns norms in fp64. bf16 keeps 8 bits of every element,
// int16 keeps 15 bits of the largest possible row norm
static QuantisedRow quantise_row(const float* row, int64_t d, uint16_t* out, int64_t padded) {
  double squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < d; ++i) squares += static_cast<double>(row[i]) * row[i];
  const double norm = __builtin_sqrt(squares);
  for (int64_t i = d; i < padded; ++i) out[i] = 0;
  // outside this range (or NaN) the bound would meet fp32's limits: let everything pass instead
  if (!(norm >= kSmallestNorm && norm <= kLargestNorm)) {
    for (int64_t i = 0; i < d; ++i) out[i] = 0;
    return {norm == 0 ? 0. : 1., norm, norm == 0 ? 0. : __builtin_inf()};
  }
  double errors = 0;
#if defined(MIK_AMX_TILES)
  // a power of two, so that scaling is exact: the norm comes to lie in 1..2
  uint64_t exponent;
  __builtin_memcpy(&exponent, &norm, 8);
  exponent &= 0x7ff0000000000000u;
  double scale;
  __builtin_memcpy(&scale, &exponent, 8);
  const float inverse = static_cast<float>(1. / scale);
#pragma omp simd reduction(+ : errors)
  for (int64_t i = 0; i < d; ++i) {
    const float value = row[i] * inverse;
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    float kept;
    __builtin_memcpy(&kept, &rounded, 4);
    out[i] = static_cast<uint16_t>(rounded >> 16);
    const double error = static_cast<double>(value) - kept;
    errors += error * error;
  }
#else
  const double scale = norm / 32000.;
  const float inverse = static_cast<float>(1. / scale), step = static_cast<float>(scale);
#pragma omp simd reduction(+ : errors)
  for (int64_t i = 0; i < d; ++i) {
    // adding 1.5 * 2^23 rounds to an integer in the low mantissa bits
    const float shifted = row[i] * inverse + 12582912.f;
    const float units = shifted - 12582912.f;
    out[i] = static_cast<uint16_t>(static_cast<int16_t>(static_cast<int32_t>(units)));
    const double error = static_cast<double>(row[i]) - static_cast<double>(step) * units;
    errors += error * error;
  }
  return {static_cast<double>(step), norm, __builtin_sqrt(errors)};
#endif
#if defined(MIK_AMX_TILES)
  return {scale, norm, __builtin_sqrt(errors) * scale};
#endif
}

#if defined(MIK_DOT_BYTES)
// the row's norms, of what fp32 sums of `padded` squares in eight lanes or more make of them: their
// rounding is 1/8 of a chain's
static inline QuantisedRow rounded_up(float scale, double squares, double errors, int64_t padded) {
  const double up = 1 + static_cast<double>(padded / 8 + 64) * 0x1p-24;
  return {scale, __builtin_sqrt(squares) * up, __builtin_sqrt(errors) * scale * up};
}

// as quantise_row of from[i] columns[i], to both widths in one go: bytes by the largest number.
// Errors are summed in units of the step, which keeps their squares clear of fp32's limits
static TwiceQuantised quantise_row_twice(const float* from, const float* columns, int64_t d,
                                         int64_t padded, float* row, int8_t* coarse,
                                         uint16_t* fine) {
  constexpr float magic = 12582912.f;
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) row[i] = from[i] * columns[i];
  for (int64_t i = d; i < padded; ++i) row[i] = 0;
  float squares = 0, largest = 0;
#pragma omp simd reduction(+ : squares) reduction(max : largest)
  for (int64_t i = 0; i < padded; ++i) {
    const float size = __builtin_fabsf(row[i]);
    squares += size * size;
    largest = size > largest ? size : largest;
  }
  const float norm = __builtin_sqrtf(squares);
  if (!(norm >= static_cast<float>(kSmallestNorm) && norm <= static_cast<float>(kLargestNorm))) {
    __builtin_memset(coarse, 0, padded);
    __builtin_memset(fine, 0, 2 * padded);
    const bool zero = largest == 0 && norm == 0;
    const QuantisedRow all{zero ? 0. : 1., norm, zero ? 0. : __builtin_inf()};
    return {all, all, 0};
  }
  const float step8 = largest / 127.f, inverse8 = 1.f / step8;
  const float step16 = norm / 32000.f, inverse16 = 1.f / step16;
  float errors8 = 0, errors16 = 0;
  int32_t sum = 0;
#pragma omp simd reduction(+ : errors8, errors16, sum)
  for (int64_t i = 0; i < padded; ++i) {
    const float units8 = row[i] * inverse8 + magic - magic;
    const float units16 = row[i] * inverse16 + magic - magic;
    const int32_t whole = static_cast<int32_t>(units8);
    coarse[i] = static_cast<int8_t>(whole);
    sum += whole;
    fine[i] = static_cast<uint16_t>(static_cast<int16_t>(static_cast<int32_t>(units16)));
    const float error8 = __builtin_fmaf(-step8, units8, row[i]) * inverse8;
    const float error16 = __builtin_fmaf(-step16, units16, row[i]) * inverse16;
    errors8 += error8 * error8;
    errors16 += error16 * error16;
  }
  return {rounded_up(step16, squares, errors16, padded),
          rounded_up(step8, squares, errors8, padded), sum};
}
#endif
