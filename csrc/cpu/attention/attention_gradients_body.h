// SPDX-License-Identifier: Apache-2.0
// Attention's gradients for a block of queries, in register tiles; compiled once per level.

#include "cpu/simd/wide_body.h"

#include "cpu/simd/exponential_body.h"

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

// terms of one running sum; 128 numbers of 64 queries are 32 KB of the first-level cache
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

// keys of a chunk that the queries from r to the end of its strip meet
template <class A>
static inline int64_t keys_met(const AttentionBlock<A>& of, const KeyChunk& chunk, int64_t r) {
  const int64_t met = of.first_row + r / kStrip * kStrip + kStrip - chunk.key;
  return !of.causal || met > chunk.count ? chunk.count : met < 0 ? 0 : met;
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
    const int64_t met = keys_met(of, chunk, r);
    for (int64_t j = 0; j < met; ++j) {
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

// f(first key, keys, first query) for the chunk's parts that all later queries of the block meet:
// the whole chunk, or strips of keys
template <class A, class F>
static inline void each_strip(const AttentionBlock<A>& of, const KeyChunk& chunk, const F& f) {
  const int64_t ahead = chunk.key - of.first_row;
  if (!of.causal || ahead + chunk.count <= kStrip) return f(0, chunk.count, 0);
  // keys that all queries meet, then those that some do
  const int64_t all = ahead >= 0 ? 0 : -ahead;
  for (int64_t j = 0; j < chunk.count;) {
    const int64_t keys = j < all ? all : j + kStrip < chunk.count ? kStrip : chunk.count - j;
    f(j, keys, j < all ? 0 : j + ahead);
    j += keys;
  }
}

// scores and dP of a chunk; `added` to the scores, [keys, kQueries], -inf where a query may not
// attend, or null
template <class A>
static void attention_scores(const AttentionBlock<A>& of, const KeyChunk& chunk, const A* added) {
  each_strip(of, chunk, [&](int64_t j, int64_t keys, int64_t r) {
    const int64_t at = (chunk.at + j) * kQueries + r, key = chunk.key + j;
    product<A, false>(of.k + key * of.qk, of.qk, keys, of.q_across + r, kQueries, of.rows - r, of.e,
                      of.scores + at, kQueries, false);
    product<A, false>(of.v + key * of.vo, of.vo, keys, of.grad_across + r, kQueries, of.rows - r,
                      of.f, of.dp + at, kQueries, false);
  });
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
static void weigh(const AttentionBlock<A>& of, const KeyChunk* chunks, int64_t count) {
  using V = typename wide<A>::type;
  using I = typename exponential<A>::ints;
  constexpr int64_t lanes = MIK_VECTOR_BYTES / sizeof(A);
  const A cooler = 1 / of.temperature;
  const auto at = [&](int statistic, int64_t r) {
    return of.statistics + statistic * kQueries + r;
  };
  for (int64_t r = 0; r < of.rows; r += lanes) {
    const I some = load_wide<I>(at(kSome, r));
    store_wide(at(kMost, r), some ? load_wide<V>(at(kMost, r)) : V{});
    for (int s = kSum; s < kStatistics; ++s) store_wide(at(s, r), V{});
  }
  // a chunk's sums are added to each other before they are to those of others
  for (const KeyChunk* chunk = chunks; chunk != chunks + count; ++chunk) {
    for (int64_t r = 0; r < of.rows; r += lanes) {
      const V most = load_wide<V>(at(kMost, r));
      V sum = V{}, mean = V{}, tempered = V{}, tempered_mean = V{};
      const int64_t last = chunk->at + keys_met(of, *chunk, r);
      for (int64_t j = chunk->at; j < last; ++j) {
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
  const auto at = [&](int statistic, int64_t r) {
    return of.statistics + statistic * kQueries + r;
  };
  for (int64_t r = 0; r < of.rows; r += lanes) {
    const V sum = load_wide<V>(at(kSum, r)), mean = load_wide<V>(at(kMean, r));
    const V tempered = load_wide<V>(at(kTempered, r));
    const V tempered_mean = load_wide<V>(at(kTemperedMean, r));
    V change = V{}, squares = V{};
    const int64_t last = chunk.at + keys_met(of, chunk, r);
    for (int64_t j = chunk.at; j < last; ++j) {
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

// the statistics of a block from the scores of all its chunks
template <class A>
static void attention_weights(const AttentionBlock<A>& of, const KeyChunk* chunks, int64_t count) {
  if (of.temperature == 1)
    weigh<A, At::one>(of, chunks, count);
  else if (of.temperature == 2)
    weigh<A, At::two>(of, chunks, count);
  else
    weigh<A, At::other>(of, chunks, count);
}

// what a chunk adds to all sums
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
  // queries of a strip meet as many keys, or all queries do
  const bool whole = keys_met(of, chunk, 0) == chunk.count;
  for (int64_t r = 0; r < of.rows; r += whole ? kQueries : kStrip) {
    const int64_t most = whole ? kQueries : kStrip, rows = of.rows - r < most ? of.rows - r : most;
    const int64_t met = keys_met(of, chunk, r);
    product<A, true>(ds + r, kQueries, rows, k, of.qk, of.e, met, of.dq + r * of.qk, of.qk, true);
    product<A, true>(p + r, kQueries, rows, v, of.vo, of.f, met, of.out + r * of.vo, of.vo, true);
  }
  each_strip(of, chunk, [&](int64_t j, int64_t keys, int64_t r) {
    const int64_t at = j * kQueries + r, key = chunk.key + j;
    product<A, false>(ds + at, kQueries, keys, of.q + r * of.qk, of.qk, of.e, of.rows - r,
                      of.dk + key * of.qk, of.qk, true);
    product<A, false>(p + at, kQueries, keys, of.grad + r * of.vo, of.vo, of.f, of.rows - r,
                      of.dv + key * of.vo, of.vo, true);
  });
}

// 128 bits
template <class A>
struct narrow {
  typedef float type __attribute__((vector_size(16)));
};
template <>
struct narrow<double> {
  typedef double type __attribute__((vector_size(16)));
};

// a square block turned about its diagonal
template <class V>
static inline void turn(V (&rows)[4]) {
  const V a = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const V b = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const V c = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const V d = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  rows[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  rows[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  rows[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  rows[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}
template <class V>
static inline void turn(V (&rows)[2]) {
  const V a = __builtin_shufflevector(rows[0], rows[1], 0, 2);
  rows[1] = __builtin_shufflevector(rows[0], rows[1], 1, 3);
  rows[0] = a;
}

// to[c, r] = from[r, c] for whole strips of rows, those of `from` `row` apart, in whole cache lines
template <class A>
static void across(const A* from, int64_t row, int64_t rows, int64_t cols, A* to) {
  using V = typename narrow<A>::type;
  constexpr int side = 16 / sizeof(A);
  for (int64_t r = 0; r < rows; r += side)
    for (int64_t c = 0; c < cols; c += side) {
      V block[side];
      for (int i = 0; i < side; ++i) block[i] = load_wide<V>(from + (r + i) * row + c);
      turn(block);
      for (int i = 0; i < side; ++i) store_wide(to + (c + i) * kQueries + r, block[i]);
    }
}

// to[r, j] = from[r, j], rows of `from` `row` and its numbers `inner` apart, those of `to` kKeys
template <class A, class B>
static void take_bias(const B* from, int64_t row, int64_t inner, int64_t rows, int64_t keys,
                      A* to) {
  for (int64_t r = 0; r < rows; ++r, from += row, to += kKeys) {
    if (inner == 1) {
#pragma omp simd
      for (int64_t j = 0; j < keys; ++j) to[j] = static_cast<A>(from[j]);
    } else {
      for (int64_t j = 0; j < keys; ++j) to[j] = static_cast<A>(from[j * inner]);
    }
  }
}

// -inf where `from` is 0: bytes, because loops over bool are not made of vectors
template <class A>
static void take_keep(const uint8_t* from, int64_t row, int64_t inner, int64_t rows, int64_t keys,
                      A* to) {
  constexpr A none = -static_cast<A>(__builtin_inf());
  for (int64_t r = 0; r < rows; ++r, from += row, to += kKeys) {
    if (inner == 1) {
#pragma omp simd
      for (int64_t j = 0; j < keys; ++j) {
        const A added = to[j];
        to[j] = from[j] != 0 ? added : none;
      }
    } else {
      for (int64_t j = 0; j < keys; ++j)
        if (from[j * inner] == 0) to[j] = none;
    }
  }
}

// whether there is a number that is not -inf
template <class A>
static bool any_kept(const A* of, int64_t rows, int64_t keys) {
  constexpr A none = -static_cast<A>(__builtin_inf());
  int any = 0;
  for (int64_t r = 0; r < rows && !any; ++r)
#pragma omp simd reduction(| : any)
    for (int64_t j = 0; j < keys; ++j) any |= of[r * kKeys + j] != none;
  return any;
}

// largest[c] = max |of[r, c]| over the rows that are numbers: a NaN is in what it is compared with
template <class A>
static void column_sizes(const A* of, int64_t row, int64_t rows, int64_t cols, A* largest) {
  for (int64_t c = 0; c < cols; ++c) largest[c] = A(0);
  for (int64_t r = 0; r < rows; ++r)
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      const A size = __builtin_fabs(of[r * row + c]), most = largest[c];
      largest[c] = size > most ? size : most;
    }
}

template <class A>
static void add_numbers(const A* from, int64_t count, A* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// to[r, c] = scale from[r, c], `to` dense
template <class A, class T>
static void write_rows(const A* from, int64_t row, int64_t rows, int64_t cols, A scale, T* to) {
  for (int64_t r = 0; r < rows; ++r)
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) to[r * cols + c] = static_cast<T>(scale * from[r * row + c]);
}

// the largest |found[c] - given[c]| / largest[c], of whole cache lines; 0 / 0 is 0, a column of
// zeros that gave zero
template <class A>
static A distance(const A* found, const A* given, const A* largest, int64_t cols) {
  using V = typename wide<A>::type;
  using I = typename exponential<A>::ints;
  constexpr int64_t lanes = MIK_VECTOR_BYTES / sizeof(A);
  // NaN is the largest
  I most = I{};
  for (int64_t c = 0; c < cols; c += lanes) {
    const V one = load_wide<V>(found + c), other = load_wide<V>(given + c);
    const V apart = one == other ? V{} : (one - other) / load_wide<V>(largest + c);
    I size;
    __builtin_memcpy(&size, &apart, sizeof(size));
    size &= kNoSign<A>;
    most = size > most ? size : most;
  }
  auto bits = most[0];
  for (int64_t l = 1; l < lanes; ++l) bits = most[l] > bits ? most[l] : bits;
  A result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}
