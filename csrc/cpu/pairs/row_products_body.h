// SPDX-License-Identifier: Apache-2.0
// Products of rows with rows, in register tiles; compiled once per level.
//
// Where both operands run along the contraction, neither is packed or transposed: a tile of rows is
// loaded as it lies, and the lanes of its sums are added up at the end, as many sums at a time as a
// vector has lanes. That reached 92 % of the multiply-adds' peak at d 768 and 84 at 256 (one Zen 5
// core, data in its second-level cache). With one operand packed it was 95, less what the packing
// takes: 6 where it transposes (0.25 cycles a number, 128 rows), for chains of 128 terms in place
// of 48. So only a b that lies across the contraction is packed, which is a copy then.

#include "cpu/simd/wide_body.h"

#if MIK_VECTOR_BYTES == 64
constexpr int kTileRows = 4, kTileCols = 6;         // 24 sums, 4 rows, 1 column of 32 registers
constexpr int kAcrossRows = 8, kAcrossVectors = 3;  // 24 sums, 3 columns, 1 number
#elif MIK_VECTOR_BYTES == 32
constexpr int kTileRows = 3, kTileCols = 4;         // 12 sums, 3 rows, 1 column of 16
constexpr int kAcrossRows = 4, kAcrossVectors = 3;  // 12 sums, 3 columns, 1 number
#else
constexpr int kTileRows = 2, kTileCols = 4;
constexpr int kAcrossRows = 4, kAcrossVectors = 2;
#endif

// the numbers 0..N - 1, as a pack
template <int... I>
struct indices {};
template <int N, int... I>
struct indices_below : indices_below<N - 1, N - 1, I...> {};
template <int... I>
struct indices_below<0, I...> {
  using type = indices<I...>;
};

// where lane i of a folded pair comes from: lanes 0..Lanes - 1 are the first vector's. Groups of
// 2 Apart lanes become groups of Apart. Within 128 bits, where shuffles are cheaper, the groups of
// the two vectors alternate
template <int Lanes, int Block, int Apart>
static constexpr int folded_from(int i) {
  if (Apart >= Block) return i / Apart * 2 * Apart + i % Apart;
  const int within = i % Block, second = within / (Block / 2), place = within % (Block / 2);
  return second * Lanes + i - within + place / Apart * 2 * Apart + place % Apart;
}

template <int Apart, int Block, class V, int... I>
[[gnu::always_inline]] static inline V fold_pair(V a, V b, indices<I...>) {
  constexpr int lanes = sizeof...(I);
  return __builtin_shufflevector(a, b, folded_from<lanes, Block, Apart>(I)...) +
         __builtin_shufflevector(a, b, (folded_from<lanes, Block, Apart>(I) + Apart)...);
}

// the sums of the lanes of `lanes` vectors, by halves. With B blocks of 128 bits and Q sums each,
// those of vector q B + b are lane q of block b
template <class A, class V, int Apart = sizeof(V) / sizeof(A) / 2>
[[gnu::always_inline]] static inline V sum_lanes(const V* of) {
  V half[Apart];
#pragma GCC unroll 8
  for (int i = 0; i < Apart; ++i)
    half[i] = fold_pair<Apart, 16 / sizeof(A)>(
        of[2 * i], of[2 * i + 1], typename indices_below<sizeof(V) / sizeof(A)>::type{});
  if constexpr (Apart == 1)
    return half[0];
  else
    return sum_lanes<A, V, Apart / 2>(half);
}

// 128 bits of sums, and the same in fp64
template <class A>
struct block_of {
  typedef float narrow __attribute__((vector_size(16)));
  typedef double wide __attribute__((vector_size(32)));
};
template <>
struct block_of<double> {
  typedef double narrow __attribute__((vector_size(16)));
  typedef narrow wide;
};

// to[0:cols] += a block
template <class A>
[[gnu::always_inline]] static inline void add_block(const void* sums, int cols, double* to) {
  using narrow = typename block_of<A>::narrow;
  using wide = typename block_of<A>::wide;
  narrow block;
  __builtin_memcpy(&block, sums, sizeof(block));
  wide added = __builtin_convertvector(block, wide);
  if (cols == 16 / sizeof(A)) {
    added += load_wide<wide>(to);
    __builtin_memcpy(to, &added, sizeof(added));
  } else {
#pragma GCC unroll 4
    for (int c = 0; c < cols; ++c) to[c] += added[c];
  }
}

// acc[r][c] += the lanes of sums[r][c], for the first `rows` rows
template <class A, int N, class V>
[[gnu::always_inline]] static inline void add_sums(const V (*sums)[N], int rows, double* acc,
                                                   int64_t ld) {
  constexpr int lanes = sizeof(V) / sizeof(A), across = 16 / sizeof(A), down = lanes / across;
#pragma GCC unroll 8
  for (int c0 = 0; c0 < N; c0 += across) {
    // columns that are not there repeat others, and cost nothing then
    const int cols = N - c0 < across ? N - c0 : across;
#pragma GCC unroll 8
    for (int r0 = 0; r0 < kTileRows; r0 += down) {
      V group[lanes];
#pragma GCC unroll 4
      for (int c = 0; c < across; ++c)
#pragma GCC unroll 4
        for (int r = 0; r < down; ++r)
          group[c * down + r] = sums[(r0 + r) % kTileRows][c0 + c % cols];
      const V folded = sum_lanes<A, V>(group);
#pragma GCC unroll 4
      for (int r = 0; r < down; ++r) {
        if (r0 + r >= rows) break;
        add_block<A>(reinterpret_cast<const char*>(&folded) + 16 * r, cols,
                     acc + (r0 + r) * ld + c0);
      }
    }
  }
}

// the first `d` numbers of a vector, zeros beyond them
template <class V, class A>
static inline V load_some(const A* at, int64_t d) {
  constexpr int64_t lanes = sizeof(V) / sizeof(A);
  A padded[lanes] = {};
  __builtin_memcpy(padded, at, (d < lanes ? d : lanes) * sizeof(A));
  return load_wide<V>(padded);
}

// numbers to fetch while a tile is computed: of each of the rows `step` a vector's time
template <class A>
struct Ahead {
  const A* rows[kTileRows];
  int count;
  int64_t step;
};

// acc[r][c] += <a[r], b[c]> over d numbers, for the first `rows` of kTileRows rows and N columns.
// Fetched is at least the number of rows ahead
template <class A, int N, int Fetched>
static inline void dot_tile(const A* const* a, const Ahead<A>& ahead, const A* const* b, int64_t d,
                            int rows, double* acc, int64_t ld) {
  using V = typename wide<A>::type;
  constexpr int64_t lanes = MIK_VECTOR_BYTES / sizeof(A);
  V sums[kTileRows][N];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) sums[r][c] = V{};
  const A* next[Fetched];
  for (int r = 0; r < Fetched; ++r) next[r] = ahead.rows[r];
  int64_t k = 0;
  for (; k + lanes <= d; k += lanes) {
#pragma GCC unroll 8
    for (int r = 0; r < Fetched; ++r) __builtin_prefetch(next[r]), next[r] += ahead.step;
    V row[kTileRows];
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) row[r] = load_wide<V>(a[r] + k);
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) {
      const V column = load_wide<V>(b[c] + k);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) sums[r][c] += row[r] * column;
    }
  }
  if (k < d) {
    V row[kTileRows];
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) row[r] = load_some<V>(a[r] + k, d - k);
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) {
      const V column = load_some<V>(b[c] + k, d - k);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) sums[r][c] += row[r] * column;
    }
  }
  add_sums<A, N>(sums, rows, acc, ld);
}

// the first `cols` of kTileCols columns
template <class A, int N = kTileCols>
static inline void some_columns(const A* const* a, const Ahead<A>& ahead, const A* const* b,
                                int64_t cols, int64_t d, int rows, double* acc, int64_t ld) {
  if constexpr (N > 1) {
    if (cols < N) return some_columns<A, N - 1>(a, ahead, b, cols, d, rows, acc, ld);
  }
  if (ahead.count == 1)
    dot_tile<A, N, 1>(a, ahead, b, d, rows, acc, ld);
  else if (ahead.count == 2)
    dot_tile<A, N, 2>(a, ahead, b, d, rows, acc, ld);
  else
    dot_tile<A, N, kTileRows>(a, ahead, b, d, rows, acc, ld);
}

// the share of step `step` of `steps`, each of `deep` numbers, in fetching the d numbers of each of
// the next rows: one row after another, from end to end, since memory delivers one stream at the
// rate that four tiles of columns need, and several at half of it
template <class A>
static inline Ahead<A> share_of(const A* const* rows, int64_t d, int64_t deep, int step,
                                int steps) {
  constexpr int lanes = MIK_VECTOR_BYTES / sizeof(A);
  const int parts = steps < kTileRows ? 1 : steps / kTileRows, row = step / parts;
  const int first = steps < kTileRows ? step * kTileRows / steps : row < kTileRows ? row : 0;
  const int last = steps < kTileRows ? (step + 1) * kTileRows / steps : first + 1;
  const int64_t length = d / parts;
  Ahead<A> ahead;
  ahead.count = last - first;
  // steps that are left over fetch nothing new
  ahead.step = steps < kTileRows || row < kTileRows ? length * lanes / deep : 0;
  for (int r = 0; r < kTileRows; ++r)
    ahead.rows[r] = rows[first + r < last ? first + r : first] + step % parts * length;
  return ahead;
}

// rows that meet a tile of many columns in turn: that stays in the first-level cache, and less is
// read from the second than when each tile of rows met all columns
constexpr int64_t kRowsInTurn = 48;

// tiles without a pair below its limit are passed over, others are filled whole. Where columns are
// few, a tile of rows meets them chunk by chunk: rows that come from memory are read from end to
// end, once
template <class A>
static void block_products(const RowProducts<A>& of) {
  const auto [a, rows, b, cols, d, chunk, limits, first_row, acc, ld] = of;
  const int tiles = static_cast<int>((cols + kTileCols - 1) / kTileCols);
  const int steps = static_cast<int>((d + chunk - 1) / chunk) * tiles;
  // what is fetched alongside are the next rows of a turn: there must be some
  const bool many = tiles > kTileRows && steps == tiles && rows > kRowsInTurn;
  const int64_t turn = many ? kRowsInTurn : kTileRows;
  for (int64_t i0 = 0; i0 < rows; i0 += turn) {
    const int64_t end = rows - i0 < turn ? rows : i0 + turn;
    int step = 0;
    for (int64_t k = 0; k < d; k += chunk) {
      const int64_t deep = d - k < chunk ? d - k : chunk;
      for (int tile = 0; tile < tiles; ++tile, ++step) {
        const int64_t j = tile * kTileCols, across = cols - j < kTileCols ? cols - j : kTileCols;
        const A* column[kTileCols];
        for (int c = 0; c < across; ++c) column[c] = b[j + c] + k;
        for (int64_t i = i0; i < end; i += kTileRows) {
          if (limits != nullptr) {
            bool any = false;
            for (int64_t c = 0; c < across; ++c) any = any || first_row + i < limits[j + c];
            if (!any) continue;
          }
          const int here = end - i < kTileRows ? static_cast<int>(end - i) : kTileRows;
          const A *row[kTileRows], *next[kTileRows];
          for (int r = 0; r < kTileRows; ++r) {
            row[r] = a[i + (r < here ? r : here - 1)] + k;
            next[r] = a[i + r + turn < rows ? i + r + turn : rows - 1];
          }
          some_columns<A>(row, share_of(next, d, deep, step, steps), column, across, deep, here,
                          acc + i * ld + j, ld);
        }
      }
    }
  }
}

// sums of the accumulator type, as fp64
template <class A>
struct sums_of {
  typedef double type __attribute__((vector_size(2 * MIK_VECTOR_BYTES)));
};
template <>
struct sums_of<double> {
  typedef wide_doubles type;
};

// acc[r][c] += sum_k a[r][k step] b[k][c] over d numbers, for the first `rows` of kAcrossRows rows
// and `cols` of N vectors of columns, b dense [d, N]. Alongside are fetched a kilobyte from each of
// `next`, or rows ahead where there is none
template <class A, int N>
static inline void across_tile(const A* const* a, int64_t step, const A* const* ahead,
                               const char* const* next, const A* b, int64_t d, int rows,
                               int64_t cols, double* acc, int64_t ld) {
  using V = typename wide<A>::type;
  using W = typename sums_of<A>::type;
  constexpr int64_t lanes = MIK_VECTOR_BYTES / sizeof(A), line = 64 / sizeof(A);
  V sums[kAcrossRows][N];
#pragma GCC unroll 8
  for (int r = 0; r < kAcrossRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sums[r][v] = V{};
  for (int64_t k0 = 0; k0 < d; k0 += line) {
    const int64_t last = d - k0 < line ? d : k0 + line;
    if (next != nullptr) {
      for (int64_t at = k0 / line * 128; at < k0 / line * 128 + 128; at += 64) {
        __builtin_prefetch(next[0] + at);
        __builtin_prefetch(next[1] + at);
      }
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < kAcrossRows; ++r) __builtin_prefetch(ahead[r] + k0);
    }
    for (int64_t k = k0; k < last; ++k) {
      V column[N];
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) column[v] = load_wide<V>(b + (k * N + v) * lanes);
#pragma GCC unroll 8
      for (int r = 0; r < kAcrossRows; ++r) {
        const A number = a[r][k * step];
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) sums[r][v] += number * column[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kAcrossRows; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      double* to = acc + r * ld + v * lanes;
      W added = __builtin_convertvector(sums[r][v], W);
      if ((v + 1) * lanes <= cols) {
        added += load_wide<W>(to);
        __builtin_memcpy(to, &added, sizeof(added));
      } else {
        for (int64_t c = v * lanes; c < cols; ++c) to[c - v * lanes] += added[c - v * lanes];
      }
    }
  }
}

// the first `cols` columns of a panel, which has as many vectors as they need
template <class A, int N = kAcrossVectors>
static inline void across_columns(const A* const* a, int64_t step, const A* const* ahead,
                                  const char* const* next, const A* b, int64_t d, int rows,
                                  int64_t cols, double* acc, int64_t ld) {
  constexpr int64_t lanes = MIK_VECTOR_BYTES / sizeof(A);
  if constexpr (N > 1) {
    if (cols <= (N - 1) * lanes)
      return across_columns<A, N - 1>(a, step, ahead, next, b, d, rows, cols, acc, ld);
  }
  across_tile<A, N>(a, step, ahead, next, b, d, rows, cols, acc, ld);
}

// [d, cols] in panels of at most `panel` columns, the last of a multiple of `least`; zeros beyond
// them
template <class T, class A>
static inline void pack_panels(const T* from, int64_t stride, int64_t cols, int64_t d,
                               int64_t panel, int64_t least, A* to) {
  for (int64_t j = 0; j < cols; j += panel) {
    const int64_t here = cols - j < panel ? cols - j : panel;
    const int64_t wide = (here + least - 1) / least * least;
    for (int64_t k = 0; k < d; ++k) {
      const T* row = from + k * stride + j;
#pragma omp simd
      for (int64_t c = 0; c < here; ++c) to[c] = static_cast<A>(row[c]);
      for (int64_t c = here; c < wide; ++c) to[c] = A(0);
      to += wide;
    }
  }
}

// for the columns, or for the rows, of across_products
template <class T, class A>
static void pack_across(const T* from, int64_t stride, int64_t count, int64_t d, bool rows, A* to) {
  constexpr int64_t lanes = MIK_VECTOR_BYTES / sizeof(A);
  if (rows)
    pack_panels(from, stride, count, d, kAcrossRows, kAcrossRows, to);
  else
    pack_panels(from, stride, count, d, kAcrossVectors * lanes, lanes, to);
}

template <class A>
static void across_products(const AcrossProducts<A>& of) {
  const auto [a, packed, rows, b, cols, d, limits, first_row, acc, ld, next, stride, count] = of;
  int64_t fetched = 0;
  constexpr int64_t lanes = MIK_VECTOR_BYTES / sizeof(A), panel = kAcrossVectors * lanes;
  for (int64_t j = 0; j < cols; j += panel) {
    const int64_t across = cols - j < panel ? cols - j : panel;
    for (int64_t i = 0; i < rows; i += kAcrossRows) {
      if (limits != nullptr) {
        bool any = false;
        for (int64_t c = 0; c < across; ++c) any = any || first_row + i < limits[j + c];
        if (!any) continue;
      }
      const int here = rows - i < kAcrossRows ? static_cast<int>(rows - i) : kAcrossRows;
      const A *row[kAcrossRows], *ahead[kAcrossRows];
      for (int r = 0; r < kAcrossRows; ++r) {
        const int64_t below = i + r + kAcrossRows;
        row[r] = packed != nullptr ? packed + i * d + r : a[i + (r < here ? r : here - 1)];
        ahead[r] = packed != nullptr ? row[r] : a[below < rows ? below : rows - 1];
      }
      // a token a tile
      const char* const fetch[2] = {next[0] + fetched * stride, next[1] + fetched * stride};
      if (fetched + 1 < count) ++fetched;
      across_columns<A>(row, packed != nullptr ? kAcrossRows : 1, ahead,
                        count > 0 ? fetch : nullptr, b + j * d, d, here, across, acc + i * ld + j,
                        ld);
    }
  }
}

template <class T, class A>
static void copy_row(const T* from, int64_t stride, const T* scale, int64_t scale_stride, int64_t d,
                     A* to) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) to[i] = static_cast<A>(from[i]);
  } else {
    for (int64_t i = 0; i < d; ++i) to[i] = static_cast<A>(from[i * stride]);
  }
  if (scale != nullptr)
    for (int64_t i = 0; i < d; ++i) to[i] *= static_cast<A>(scale[i * scale_stride]);
}

// out[i, j] += weight sums[i, j], and with `mirrored` out[j, i] += the same: both dense along their
// last axis, rows of out `row` apart
template <class A>
static void add_scores(const double* sums, int64_t ld, int64_t rows, int64_t cols, double weight,
                       int64_t row, A* out, A* mirrored) {
  for (int64_t i = 0; i < rows; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j)
      out[i * row + j] += static_cast<A>(weight * sums[i * ld + j]);
  }
  if (mirrored == nullptr) return;
  // a cache line of sums and of `mirrored` at a time
  constexpr int64_t down = 16, across = 8;
  for (int64_t j = 0; j < cols; j += across) {
    const int64_t last = cols - j < across ? cols : j + across;
    for (int64_t i0 = 0; i0 < rows; i0 += down) {
      const int64_t end = rows - i0 < down ? rows : i0 + down;
      for (int64_t c = j; c < last; ++c)
        for (int64_t i = i0; i < end; ++i)
          mirrored[c * row + i] += static_cast<A>(weight * sums[i * ld + c]);
    }
  }
}

// sums[i] += a[i] b[i]
static void add_products(const double* a, const double* b, int64_t count, double* sums) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sums[i] += a[i] * b[i];
}

static double sum_squares(const double* of, int64_t count) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) total += of[i] * of[i];
  return total;
}
