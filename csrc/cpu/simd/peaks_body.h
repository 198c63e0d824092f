// SPDX-License-Identifier: Apache-2.0
// Arithmetic ceilings of one core; compiled once per level.

#include "cpu/simd/wide_body.h"

// multiply-adds of 12 independent vectors, enough to cover 4 cycles at 2 per cycle
static double fma_flops(int64_t rounds, float* sink) {
  constexpr int lanes = MIK_VECTOR_BYTES / 4;
  wide_floats a[12], x, y;
  for (int l = 0; l < lanes; ++l) x[l] = 0.999f, y[l] = 1e-6f;
  for (int i = 0; i < 12; ++i)
    for (int l = 0; l < lanes; ++l) a[i][l] = static_cast<float>(i);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) a[i] = a[i] * x + y;
  }
  for (int i = 1; i < 12; ++i) a[0] += a[i];
  for (int l = 0; l < lanes; ++l) sink[l] = a[0][l];
  return 2.0 * 12 * lanes * static_cast<double>(rounds);
}

// int16 pair products with int32 sums, as the screens do them; 0 at the portable level, whose
// screen no benchmark compares with a ceiling
static double madd16_ops(int64_t rounds, float* sink) {
#if MIK_VECTOR_BYTES == 64
  __m512i a[12], x = _mm512_set1_epi16(3), y = _mm512_set1_epi16(5);
  for (int i = 0; i < 12; ++i) a[i] = _mm512_set1_epi32(i);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) a[i] = _mm512_dpwssd_epi32(a[i], x, y);
  }
  for (int i = 1; i < 12; ++i) a[0] = _mm512_add_epi32(a[0], a[i]);
  sink[0] = static_cast<float>(_mm512_reduce_add_epi32(a[0]));
  return 2.0 * 12 * 32 * static_cast<double>(rounds);
#elif MIK_VECTOR_BYTES == 32
  __m256i a[6], x = _mm256_set1_epi16(3), y = _mm256_set1_epi16(5);
  for (int i = 0; i < 6; ++i) a[i] = _mm256_set1_epi32(i);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      // opaque, or the compiler hoists the product out of the loop
      asm volatile("" : "+x"(x));
#if defined(MIK_DOT_BYTES)
      a[i] = _mm256_dpwssd_avx_epi32(a[i], x, y);
#else
      a[i] = _mm256_add_epi32(a[i], _mm256_madd_epi16(x, y));
#endif
    }
  }
  for (int i = 1; i < 6; ++i) a[0] = _mm256_add_epi32(a[0], a[i]);
  sink[0] = static_cast<float>(_mm256_extract_epi32(a[0], 0));
  return 2.0 * 6 * 16 * static_cast<double>(rounds);
#else
  (void)rounds;
  (void)sink;
  return 0;
#endif
}

// products of bytes with int32 sums, as the coarse screens do them; 0 where there are none
static double dot8_ops(int64_t rounds, float* sink) {
#if defined(MIK_DOT_BYTES) && MIK_VECTOR_BYTES == 64
  __m512i a[12], x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(5);
  for (int i = 0; i < 12; ++i) a[i] = _mm512_set1_epi32(i);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) a[i] = _mm512_dpbusd_epi32(a[i], x, y);
  }
  for (int i = 1; i < 12; ++i) a[0] = _mm512_add_epi32(a[0], a[i]);
  sink[0] = static_cast<float>(_mm512_reduce_add_epi32(a[0]));
  return 2.0 * 12 * 64 * static_cast<double>(rounds);
#elif defined(MIK_DOT_BYTES)
  __m256i a[12], x = _mm256_set1_epi8(3), y = _mm256_set1_epi8(5);
  for (int i = 0; i < 12; ++i) a[i] = _mm256_set1_epi32(i);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) a[i] = _mm256_dpbusd_avx_epi32(a[i], x, y);
  }
  for (int i = 1; i < 12; ++i) a[0] = _mm256_add_epi32(a[0], a[i]);
  sink[0] = static_cast<float>(_mm256_extract_epi32(a[0], 0));
  return 2.0 * 12 * 32 * static_cast<double>(rounds);
#else
  (void)rounds;
  (void)sink;
  return 0;
#endif
}

// reads `count` floats once; eight running sums keep the loads ahead of the additions
static float read_sum(const float* from, int64_t count) {
  constexpr int64_t step = 8 * MIK_VECTOR_BYTES / 4;
  float sums[step] = {};
  for (int64_t i = 0; i + step <= count; i += step)
#pragma omp simd
    for (int64_t j = 0; j < step; ++j) sums[j] += from[i + j];
  float total = 0;
  for (int64_t j = 0; j < step; ++j) total += sums[j];
  return total;
}
