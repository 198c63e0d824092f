// SPDX-License-Identifier: Apache-2.0
// Attention's gradients for a block of queries, in register tiles; compiled once per level.

// clang-format off: vectors come before what is made of them
#include "cpu/simd/wide_body.h"
#include "cpu/simd/exponential_body.h"
// clang-format on

constexpr int kTileRows = 6;
#if MIK_VECTOR_BYTES == 64
constexpr int kTileVectors = 4;  // 24 sums, 4 columns, 1 number of 32 registers
#else
constexpr int kTileVectors = 2;  // 12 sums, 2 columns, 1 number of 16
#endif

// c[i, 0:N] = or += sum_k a(i, k) b[k, 0:N] for M rows and N vectors of columns; a(i, k) is
// a[i, k], or a[k, i] if it is Across
template <class A, bool Across, int M, int N>
static void product_tile(const A* a, int64_t lda, const A* b, int64_t ldb, int64_t depth, A* c,
                         int64_t ldc, bool add) {
  using V = typename wide<A>::type;
  constexpr int64_t lanes = MIK_VECTOR_BYTES / sizeof(A);
  V sums[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) sums[i][v] = V{};
  for (int64_t k = 0; k < depth; ++k) {
    V column[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) column[v] = load_wide<V>(b + k * ldb + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const A number = Across ? a[k * lda + i] : a[i * lda + k];
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) sums[i][v] += number * column[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      A* const to = c + i * ldc + v * lanes;
      if (add) sums[i][v] += load_wide<V>(to);
      __builtin_memcpy(to, &sums[i][v], sizeof(V));
    }
}

// the first `rows` rows, a tile of M at a time
template <class A, bool Across, int N, int M = kTileRows>
static void product_rows(const A* a, int64_t lda, int64_t rows, const A* b, int64_t ldb,
                         int64_t depth, A* c, int64_t ldc, bool add) {
  int64_t i = 0;
  for (; i + M <= rows; i += M)
    product_tile<A, Across, M, N>(a + (Across ? i : i * lda), lda, b, ldb, depth, c + i * ldc, ldc,
                                  add);
  if constexpr (M > 1) {
    if (i < rows)
      product_rows<A, Across, N, (M > 4 ? 4 : M / 2)>(a + (Across ? i : i * lda), lda, rows - i, b,
                                                      ldb, depth, c + i * ldc, ldc, add);
  }
}

// N vectors of columns, or as many fewer as are left
template <class A, bool Across, int N = kTileVectors>
static void product_columns(int64_t vectors, const A* a, int64_t lda, int64_t rows, const A* b,
                            int64_t ldb, int64_t depth, A* c, int64_t ldc, bool add) {
  if constexpr (N > 1) {
    if (vectors < N)
      return product_columns<A, Across, N - 1>(vectors, a, lda, rows, b, ldb, depth, c, ldc, add);
  }
  product_rows<A, Across, N>(a, lda, rows, b, ldb, depth, c, ldc, add);
}

// terms of one running sum: 128 numbers of 64 queries are 32 KB of the first-level cache
constexpr int64_t kDepth = 128;

// c[rows, cols] = or += a b; columns in whole vectors. A panel of b is met by all rows in turn
template <class A, bool Across>
static void product(const A* a, int64_t lda, int64_t rows, const A* b, int64_t ldb, int64_t cols,
                    int64_t depth, A* c, int64_t ldc, bool add) {
  constexpr int64_t lanes = MIK_VECTOR_BYTES / sizeof(A);
  const int64_t vectors = (cols + lanes - 1) / lanes;
  for (int64_t k = 0; k == 0 || k < depth; k += kDepth) {
    const int64_t deep = depth - k < kDepth ? depth - k : kDepth;
    for (int64_t v = 0; v < vectors; v += kTileVectors)
      product_columns<A, Across>(vectors - v, a + (Across ? k * lda : k), lda, rows,
                                 b + k * ldb + v * lanes, ldb, deep, c + v * lanes, ldc,
                                 add || k > 0);
  }
}

template <class A>
constexpr auto kNoSign = int32_t{0x7fffffff};
template <>
constexpr auto kNoSign<double> = int64_t{0x7fffffffffffffff};

template <class V, class A>
static inline void store_wide(A* to, V v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

// the numbers of lanes
template <class A>
static inline typename wide<A>::type lane_numbers(A first) {
  typename wide<A>::type v;
  for (int64_t l = 0; l < static_cast<int64_t>(MIK_VECTOR_BYTES / sizeof(A)); ++l)
    v[l] = first + static_cast<A>(l);
  return v;
}

// raw scores as scores; lanes that are not kept -inf
template <class A, bool Capped, bool Added, bool Edge>
static void finish_scores(const AttentionBlock<A>& of, const KeyChunk& chunk, const A* added) {
  using V = typename wide<A>::type;
  using I = typename exponential<A>::ints;
  constexpr int64_t lanes = MIK_VECTOR_BYTES / sizeof(A);
  const V none = V{} - static_cast<A>(__builtin_inf());
  for (int64_t r = 0; r < of.rows; r += lanes) {
    V most = load_wide<V>(of.statistics + kMost * kQueries + r);
    // numbers without a sign are ordered as integers are, and NaN is the largest
    I raw_most = load_wide<I>(of.statistics + kRawMost * kQueries + r);
    I some = load_wide<I>(of.statistics + kSome * kQueries + r);
    // query - key of lanes, exact below 2^24: chunks are near their queries where it is used
    const V distance = lane_numbers<A>(static_cast<A>(of.first_row + r - chunk.key));
    for (int64_t j = 0; j < chunk.count; ++j) {
      A* const at = of.scores + (chunk.at + j) * kQueries + r;
      const V raw = of.scale * load_wide<V>(at);
      V score = raw;
      if constexpr (Capped) {
        const V t = tanh_of<A>(raw / of.softcap);
        score = of.softcap * t;
        store_wide(of.slope + (chunk.at + j) * kQueries + r, 1 - t * t);
      }
      I kept = I{} - 1;
      if constexpr (Added) {
        const V more = load_wide<V>(added + j * kQueries + r);
        kept = more != none;
        score += more;
      }
      if constexpr (Edge) {
        const V ahead = distance - static_cast<A>(j);
        if (of.causal) kept &= ahead >= 0;
        if (of.window) kept &= ahead < static_cast<A>(of.window);
      }
      I magnitude;
      __builtin_memcpy(&magnitude, &raw, sizeof(magnitude));
      magnitude &= kNoSign<A>;
      if constexpr (Added || Edge) {
        score = kept ? score : none;
        magnitude &= kept;
        some |= kept;
      }
      raw_most = magnitude > raw_most ? magnitude : raw_most;
      most = score > most ? score : most;
      store_wide(at, score);
    }
    if (!(Added || Edge)) some = I{} - 1;
    store_wide(of.statistics + kMost * kQueries + r, most);
    store_wide(of.statistics + kRawMost * kQueries + r, raw_most);
    store_wide(of.statistics + kSome * kQueries + r, some);
  }
}

template <class A, bool Capped, bool Added>
static void finish_scores(const AttentionBlock<A>& of, const KeyChunk& chunk, const A* added) {
  const int64_t last_row = of.first_row + of.rows - 1, last_key = chunk.key + chunk.count - 1;
  // windows are met whole where the last query still reaches the first key
  if ((of.causal && last_key > of.first_row) || (of.window && last_row - chunk.key >= of.window))
    finish_scores<A, Capped, Added, true>(of, chunk, added);
  else
    finish_scores<A, Capped, Added, false>(of, chunk, added);
}

template <class A>
static void attention_scores(const AttentionBlock<A>& of, const KeyChunk& chunk, const A* added) {
  A* const scores = of.scores + chunk.at * kQueries;
  product<A, false>(of.k + chunk.key * of.qk, of.qk, chunk.count, of.q_across, kQueries, of.rows,
                    of.e, scores, kQueries, false);
  product<A, false>(of.v + chunk.key * of.vo, of.vo, chunk.count, of.grad_across, kQueries, of.rows,
                    of.f, of.dp + chunk.at * kQueries, kQueries, false);
  if (of.softcap > 0 && added != nullptr)
    finish_scores<A, true, true>(of, chunk, added);
  else if (of.softcap > 0)
    finish_scores<A, true, false>(of, chunk, added);
  else if (added != nullptr)
    finish_scores<A, false, true>(of, chunk, added);
  else
    finish_scores<A, false, false>(of, chunk, added);
}

// how P' comes from the scores: it is P, P is its square up to normalisation, or it takes an
// exponential of its own
enum class At { one, two, other };

// scores as exponentials, and their sums
template <class A, At Temperature>
static void weigh(const AttentionBlock<A>& of, int64_t keys) {
  using V = typename wide<A>::type;
  using I = typename exponential<A>::ints;
  constexpr int64_t lanes = MIK_VECTOR_BYTES / sizeof(A);
  const A cooler = 1 / of.temperature;
  const auto at = [&](int statistic, int64_t r) { return of.statistics + statistic * kQueries + r; };
  for (int64_t r = 0; r < of.rows; r += lanes) {
    const I some = load_wide<I>(at(kSome, r));
    store_wide(at(kMost, r), some ? load_wide<V>(at(kMost, r)) : V{});
    for (int s = kSum; s < kStatistics; ++s) store_wide(at(s, r), V{});
  }
  // a chunk's sums are added to each other before they are to those of others
  for (int64_t j0 = 0; j0 < keys; j0 += kKeys) {
    const int64_t last = keys - j0 < kKeys ? keys : j0 + kKeys;
    for (int64_t r = 0; r < of.rows; r += lanes) {
      const V most = load_wide<V>(at(kMost, r));
      V sum = V{}, mean = V{}, tempered = V{}, tempered_mean = V{};
      for (int64_t j = j0; j < last; ++j) {
        A* const score = of.scores + j * kQueries + r;
        const V below = load_wide<V>(score) - most, dp = load_wide<V>(of.dp + j * kQueries + r);
        V p;
        if constexpr (Temperature == At::one) {
          p = exp_of<A>(below);
          store_wide(score, p);
        } else if constexpr (Temperature == At::two) {
          const V half = exp_of<A>(below * cooler);
          p = half * half;
          tempered += half;
          tempered_mean += half * dp;
          store_wide(score, half);
        } else {
          const V own = exp_of<A>(below * cooler);
          p = exp_of<A>(below);
          tempered += own;
          tempered_mean += own * dp;
          store_wide(score, p);
          store_wide(of.tempered + j * kQueries + r, own);
        }
        sum += p;
        mean += p * dp;
      }
      store_wide(at(kSum, r), load_wide<V>(at(kSum, r)) + sum);
      store_wide(at(kMean, r), load_wide<V>(at(kMean, r)) + mean);
      if constexpr (Temperature != At::one) {
        store_wide(at(kTempered, r), load_wide<V>(at(kTempered, r)) + tempered);
        store_wide(at(kTemperedMean, r), load_wide<V>(at(kTemperedMean, r)) + tempered_mean);
      }
    }
  }
  for (int64_t r = 0; r < of.rows; r += lanes) {
    const I some = load_wide<I>(at(kSome, r));
    // a query without keys has sums of 0
    const V inverse = some ? 1 / load_wide<V>(at(kSum, r)) : V{};
    store_wide(at(kSum, r), inverse);
    store_wide(at(kMean, r), load_wide<V>(at(kMean, r)) * inverse);
    if constexpr (Temperature != At::one) {
      const V tempered = some ? 1 / load_wide<V>(at(kTempered, r)) : V{};
      store_wide(at(kTempered, r), tempered);
      store_wide(at(kTemperedMean, r), load_wide<V>(at(kTemperedMean, r)) * tempered);
    }
  }
}

// exponentials as P, and dP as dS times softcap'
template <class A, At Temperature, bool Capped>
static void differentiate(const AttentionBlock<A>& of, const KeyChunk& chunk) {
  using V = typename wide<A>::type;
  constexpr int64_t lanes = MIK_VECTOR_BYTES / sizeof(A);
  const auto at = [&](int statistic, int64_t r) { return of.statistics + statistic * kQueries + r; };
  for (int64_t r = 0; r < of.rows; r += lanes) {
    const V sum = load_wide<V>(at(kSum, r)), mean = load_wide<V>(at(kMean, r));
    const V tempered = load_wide<V>(at(kTempered, r));
    const V tempered_mean = load_wide<V>(at(kTemperedMean, r));
    V change = V{}, squares = V{};
    for (int64_t j = chunk.at; j < chunk.at + chunk.count; ++j) {
      A *const score = of.scores + j * kQueries + r, *const dp = of.dp + j * kQueries + r;
      const V weight = load_wide<V>(score), given = load_wide<V>(dp);
      V p, ds;
      if constexpr (Temperature == At::one) {
        p = weight * sum;
        ds = p * (given - mean);
        squares += ds * ds;
      } else {
        V own;
        if constexpr (Temperature == At::two) {
          own = weight * tempered;
          p = weight * weight * sum;
        } else {
          own = load_wide<V>(of.tempered + j * kQueries + r) * tempered;
          p = weight * sum;
        }
        ds = own * (given - tempered_mean);
        const V plain = p * (given - mean), difference = ds - plain;
        squares += plain * plain;
        change += difference * difference;
      }
      if constexpr (Capped) ds *= load_wide<V>(of.slope + j * kQueries + r);
      store_wide(score, p);
      store_wide(dp, ds);
    }
    store_wide(at(kPlain, r), load_wide<V>(at(kPlain, r)) + squares);
    if constexpr (Temperature != At::one)
      store_wide(at(kChange, r), load_wide<V>(at(kChange, r)) + change);
  }
}

template <class A, At Temperature>
static void differentiate(const AttentionBlock<A>& of, const KeyChunk& chunk) {
  if (of.softcap > 0)
    differentiate<A, Temperature, true>(of, chunk);
  else
    differentiate<A, Temperature, false>(of, chunk);
}

template <class A>
static void attention_weights(const AttentionBlock<A>& of, int64_t keys) {
  if (of.temperature == 1)
    weigh<A, At::one>(of, keys);
  else if (of.temperature == 2)
    weigh<A, At::two>(of, keys);
  else
    weigh<A, At::other>(of, keys);
}

template <class A>
static void attention_sums(const AttentionBlock<A>& of, const KeyChunk& chunk) {
  if (of.temperature == 1)
    differentiate<A, At::one>(of, chunk);
  else if (of.temperature == 2)
    differentiate<A, At::two>(of, chunk);
  else
    differentiate<A, At::other>(of, chunk);
  const A *const p = of.scores + chunk.at * kQueries, *const ds = of.dp + chunk.at * kQueries;
  const A *const k = of.k + chunk.key * of.qk, *const v = of.v + chunk.key * of.vo;
  product<A, true>(ds, kQueries, of.rows, k, of.qk, of.e, chunk.count, of.dq, of.qk, true);
  product<A, true>(p, kQueries, of.rows, v, of.vo, of.f, chunk.count, of.out, of.vo, true);
  product<A, false>(ds, kQueries, chunk.count, of.q, of.qk, of.e, of.rows,
                    of.dk + chunk.key * of.qk, of.qk, true);
  product<A, false>(p, kQueries, chunk.count, of.grad, of.vo, of.f, of.rows,
                    of.dv + chunk.key * of.vo, of.vo, true);
}

template <class A>
static void across(const A* from, int64_t row, int64_t rows, int64_t cols, A* to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) to[c * kQueries + r] = from[r * row + c];
}
