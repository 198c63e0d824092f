// SPDX-License-Identifier: Apache-2.0
// Vector operations in intrinsics, for screens and row_topk: pairs of 16-bit integers, masks. By
// vector width; part of a body, so no include guard.

#if MIK_VECTOR_BYTES == 64
constexpr int kLanes = 16;
using int_vector = __m512i;
using float_vector = __m512;
static inline int_vector zero() { return _mm512_setzero_si512(); }
static inline int_vector load_pairs(const uint16_t* at) { return _mm512_loadu_si512(at); }
static inline int_vector broadcast_pair(const uint16_t* at) {
  int32_t pair;
  __builtin_memcpy(&pair, at, 4);
  return _mm512_set1_epi32(pair);
}
static inline int_vector add_pair_products(int_vector sum, int_vector a, int_vector b) {
  return _mm512_dpwssd_epi32(sum, a, b);
}
static inline void pin(int_vector& a) { asm volatile("" : "+v"(a)); }
static inline float_vector to_float(int_vector a) { return _mm512_cvtepi32_ps(a); }
static inline float_vector set(float a) { return _mm512_set1_ps(a); }
static inline float_vector load(const float* at) { return _mm512_loadu_ps(at); }
static inline void store(float* at, float_vector a) { _mm512_storeu_ps(at, a); }
static inline float_vector add(float_vector a, float_vector b) { return _mm512_add_ps(a, b); }
static inline float_vector multiply(float_vector a, float_vector b) { return _mm512_mul_ps(a, b); }
static inline float_vector multiply_add(float_vector a, float_vector b, float_vector c) {
  return _mm512_fmadd_ps(a, b, c);
}
static inline float_vector absolute(float_vector a) { return _mm512_abs_ps(a); }
static inline unsigned not_below(float_vector a, float_vector b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ);
}
static inline unsigned not_at_most(float_vector a, float_vector b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ);
}

#elif MIK_VECTOR_BYTES == 32
constexpr int kLanes = 8;
using int_vector = __m256i;
using float_vector = __m256;
static inline int_vector zero() { return _mm256_setzero_si256(); }
static inline int_vector load_pairs(const uint16_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}
static inline int_vector broadcast_pair(const uint16_t* at) {
  int32_t pair;
  __builtin_memcpy(&pair, at, 4);
  return _mm256_set1_epi32(pair);
}
static inline int_vector add_pair_products(int_vector sum, int_vector a, int_vector b) {
#if defined(MIK_DOT_BYTES)
  return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}
static inline void pin(int_vector& a) { asm volatile("" : "+x"(a)); }
static inline float_vector to_float(int_vector a) { return _mm256_cvtepi32_ps(a); }
static inline float_vector set(float a) { return _mm256_set1_ps(a); }
static inline float_vector load(const float* at) { return _mm256_loadu_ps(at); }
static inline void store(float* at, float_vector a) { _mm256_storeu_ps(at, a); }
static inline float_vector add(float_vector a, float_vector b) { return _mm256_add_ps(a, b); }
static inline float_vector multiply(float_vector a, float_vector b) { return _mm256_mul_ps(a, b); }
static inline float_vector multiply_add(float_vector a, float_vector b, float_vector c) {
  return _mm256_fmadd_ps(a, b, c);
}
static inline float_vector absolute(float_vector a) {
  return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a);
}
static inline unsigned not_below(float_vector a, float_vector b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)));
}
static inline unsigned not_at_most(float_vector a, float_vector b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)));
}

#elif MIK_X86_LEVELS
constexpr int kLanes = 4;
using int_vector = __m128i;
using float_vector = __m128;
static inline int_vector zero() { return _mm_setzero_si128(); }
static inline int_vector load_pairs(const uint16_t* at) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
}
static inline int_vector broadcast_pair(const uint16_t* at) {
  int32_t pair;
  __builtin_memcpy(&pair, at, 4);
  return _mm_set1_epi32(pair);
}
static inline int_vector add_pair_products(int_vector sum, int_vector a, int_vector b) {
  return _mm_add_epi32(sum, _mm_madd_epi16(a, b));
}
static inline void pin(int_vector& a) { asm volatile("" : "+x"(a)); }
static inline float_vector to_float(int_vector a) { return _mm_cvtepi32_ps(a); }
static inline float_vector set(float a) { return _mm_set1_ps(a); }
static inline float_vector load(const float* at) { return _mm_loadu_ps(at); }
static inline void store(float* at, float_vector a) { _mm_storeu_ps(at, a); }
static inline float_vector add(float_vector a, float_vector b) { return _mm_add_ps(a, b); }
static inline float_vector multiply(float_vector a, float_vector b) { return _mm_mul_ps(a, b); }
static inline float_vector multiply_add(float_vector a, float_vector b, float_vector c) {
  return _mm_add_ps(_mm_mul_ps(a, b), c);
}
static inline float_vector absolute(float_vector a) { return _mm_andnot_ps(_mm_set1_ps(-0.f), a); }
static inline unsigned not_below(float_vector a, float_vector b) {
  return static_cast<unsigned>(_mm_movemask_ps(_mm_cmpnlt_ps(a, b)));
}
static inline unsigned not_at_most(float_vector a, float_vector b) {
  return static_cast<unsigned>(_mm_movemask_ps(_mm_cmpnle_ps(a, b)));
}

#else  // any other processor: one lane, left to the compiler
constexpr int kLanes = 1;
struct int_vector {
  int32_t sum;
  int16_t low, high;
};
using float_vector = float;
static inline int_vector zero() { return {0, 0, 0}; }
static inline int_vector load_pairs(const uint16_t* at) {
  return {0, static_cast<int16_t>(at[0]), static_cast<int16_t>(at[1])};
}
static inline int_vector broadcast_pair(const uint16_t* at) { return load_pairs(at); }
static inline int_vector add_pair_products(int_vector sum, int_vector a, int_vector b) {
  return {sum.sum + a.low * b.low + a.high * b.high, 0, 0};
}
static inline void pin(int_vector&) {}
static inline float_vector to_float(int_vector a) { return static_cast<float>(a.sum); }
static inline float_vector set(float a) { return a; }
static inline float_vector load(const float* at) { return *at; }
static inline void store(float* at, float_vector a) { *at = a; }
static inline float_vector add(float_vector a, float_vector b) { return a + b; }
static inline float_vector multiply(float_vector a, float_vector b) { return a * b; }
static inline float_vector multiply_add(float_vector a, float_vector b, float_vector c) {
  return a * b + c;
}
static inline float_vector absolute(float_vector a) { return __builtin_fabsf(a); }
static inline unsigned not_below(float_vector a, float_vector b) { return !(a < b); }
static inline unsigned not_at_most(float_vector a, float_vector b) { return !(a <= b); }
#endif
