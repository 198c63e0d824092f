// SPDX-License-Identifier: Apache-2.0
// Dot products of bytes in intrinsics, for levels that have them (MIK_DOT_BYTES); what else they
// need is in vectors_body.h. Part of a body, so no include guard.

#if MIK_VECTOR_BYTES == 64
static inline int_vector set_int(int32_t a) { return _mm512_set1_epi32(a); }
static inline int_vector load_bytes(const uint8_t* at) { return _mm512_loadu_si512(at); }
static inline int_vector load_ints(const int32_t* at) { return _mm512_loadu_si512(at); }
static inline void store_ints(int32_t* at, int_vector a) { _mm512_storeu_si512(at, a); }
static inline int_vector broadcast_quad(const int8_t* at) {
  int32_t quad;
  __builtin_memcpy(&quad, at, 4);
  return _mm512_set1_epi32(quad);
}
// each lane's sum += four products of an unsigned and a signed byte
static inline int_vector add_quad_products(int_vector sum, int_vector bytes, int_vector quad) {
  return _mm512_dpbusd_epi32(sum, bytes, quad);
}
// the sums of the lanes of four vectors
static inline void sum_four(int_vector a, int_vector b, int_vector c, int_vector d, int32_t* out) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}
// first + lane for every lane in the mask; writes a whole vector. Returns how many there are
static inline int append_lanes(int32_t* at, unsigned mask, int32_t first) {
  const __m512i lanes = _mm512_add_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), set_int(first));
  _mm512_storeu_si512(at, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), lanes));
  return __builtin_popcount(mask);
}

#else
static inline int_vector set_int(int32_t a) { return _mm256_set1_epi32(a); }
static inline int_vector load_bytes(const uint8_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}
static inline int_vector load_ints(const int32_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}
static inline void store_ints(int32_t* at, int_vector a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), a);
}
static inline int_vector broadcast_quad(const int8_t* at) {
  int32_t quad;
  __builtin_memcpy(&quad, at, 4);
  return _mm256_set1_epi32(quad);
}
static inline int_vector add_quad_products(int_vector sum, int_vector bytes, int_vector quad) {
  return _mm256_dpbusd_avx_epi32(sum, bytes, quad);
}
static inline void sum_four(int_vector a, int_vector b, int_vector c, int_vector d, int32_t* out) {
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
}
static inline int append_lanes(int32_t* at, unsigned mask, int32_t first) {
  int count = 0;
  for (; mask != 0; mask &= mask - 1) at[count++] = first + __builtin_ctz(mask);
  return count;
}
#endif
