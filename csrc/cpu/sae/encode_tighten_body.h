// SPDX-License-Identifier: Apache-2.0
// Raising the bound of one list of candidates; compiled once per level.

// an integer that sorts as the number does, and back
static inline int32_t to_key(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits ^ ((bits >> 31) & INT32_MAX);
}

static inline float from_key(int32_t key) {
  key ^= (key >> 31) & INT32_MAX;
  float value;
  __builtin_memcpy(&value, &key, 4);
  return value;
}

static inline int32_t count_from(const int32_t* keys, int64_t size, int32_t least) {
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < size; ++i) count += keys[i] >= least;
  return count;
}

// A number that k of `low` reach, close below the k-th largest, and not below `tau`. Any such
// number is a bound, so bisection may stop once few more than k reach it, and each of its steps is
// a count in vectors, where nth_element moves numbers about
static float raised(const float* low, int64_t size, int64_t k, float tau, int32_t* keys) {
  int32_t least = INT32_MAX, most = INT32_MIN;
#pragma omp simd reduction(min : least) reduction(max : most)
  for (int64_t i = 0; i < size; ++i) {
    keys[i] = to_key(low[i]);
    least = keys[i] < least ? keys[i] : least;
    most = keys[i] > most ? keys[i] : most;
  }
  const int32_t before = to_key(tau);
  // k reach `from`, fewer reach `to`
  int64_t from = least > before ? least : before, to = static_cast<int64_t>(most) + 1;
  if (from == before && count_from(keys, size, before) < k) return tau;
  while (to - from > 1) {
    const int64_t middle = from + (to - from) / 2;
    const int32_t count = count_from(keys, size, static_cast<int32_t>(middle));
    if (count < k) {
      to = middle;
    } else {
      from = middle;
      if (count <= k + k / 16) break;
    }
  }
  return from_key(static_cast<int32_t>(from));
}

// drops what cannot reach tau; returns how many stay
static int64_t drop_below(float tau, float* low, float* high, float* value, int32_t* feature,
                          int64_t size) {
  int64_t kept = 0, i = 0;
#if MIK_VECTOR_BYTES == 64
  // 4.0 -> 1.0 % of the time at S1 (Zen 5)
  for (; i + 16 <= size; i += 16) {
    const __m512 highest = _mm512_loadu_ps(high + i);
    const __mmask16 stays = _mm512_cmp_ps_mask(highest, _mm512_set1_ps(tau), _CMP_NLT_UQ);
    const auto keep = [&](auto* list) {
      const __m512i all = _mm512_loadu_si512(list + i);
      _mm512_storeu_si512(list + kept, _mm512_maskz_compress_epi32(stays, all));
    };
    keep(low);
    keep(high);
    keep(value);
    keep(feature);
    kept += __builtin_popcount(stays);
  }
#endif
  // no branch: half of them would be mispredicted
  for (; i < size; ++i) {
    low[kept] = low[i];
    high[kept] = high[i];
    value[kept] = value[i];
    feature[kept] = feature[i];
    kept += !(high[kept] < tau);
  }
  return kept;
}
