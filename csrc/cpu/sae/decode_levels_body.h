// SPDX-License-Identifier: Apache-2.0
// Nested weighted sums of gathered rows, by the levels of their features; compiled once per level
// of instructions.

#include "cpu/simd/rows_body.h"

// |row|^2 in 16 interleaved parts
template <class A>
static A sum_of_squares(const A* row, int64_t d) {
  A parts[16] = {};
  int64_t i = 0;
  for (; i + 16 <= d; i += 16)
    for (int64_t lane = 0; lane < 16; ++lane) parts[lane] += row[i + lane] * row[i + lane];
  A total = A(0);
  for (; i < d; ++i) total += row[i] * row[i];
  for (int64_t lane = 0; lane < 16; ++lane) total += parts[lane];
  return total;
}

// the slots in use of one token sorted by level, each level's in stored order: those of level p
// are ends[p - 1]..ends[p] of rows and weights (0..ends[0] of the first)
template <class T, class A>
static void sort_by_level(int64_t first, int64_t last, const DecodeLevels<T, A>& o,
                          const LevelScratch<T, A>& s) {
  for (int64_t p = 0; p <= o.count; ++p) s.ends[p] = 0;
  for (int64_t j = first; j < last; ++j)
    s.ends[o.levels[o.indices[j]] + 1] += static_cast<A>(o.values[j]) != A(0);
  for (int64_t p = 0; p < o.count; ++p) s.ends[p + 1] += s.ends[p];
  for (int64_t j = first; j < last; ++j) {
    const A weight = static_cast<A>(o.values[j]);
    if (weight == A(0)) continue;
    const int64_t place = s.ends[o.levels[o.indices[j]]]++;
    s.weights[place] = weight;
    s.rows[place] = o.w + o.indices[j] * o.w_row;
  }
}

// all outputs of tokens begin..end; the errors of one token's prefixes stay in cache until they
// are mixed
template <class T, class A, class Owned>
static void decode_by_level(int64_t begin, int64_t end, Owned owned, const DecodeLevels<T, A>& o,
                            const LevelScratch<T, A>& s) {
  const int64_t d = o.d, count = o.count;
  for (int64_t g = 0; g < count; ++g) {
    int64_t mixes = 0;
    for (int64_t p = 0; p < count; ++p) {
      const A share = static_cast<A>(o.mix[g * count + p]);
      s.sources[g * count + mixes] = s.errors + p * d;
      s.shares[g * count + mixes] = share;
      mixes += share != A(0);
    }
    s.mixes[g] = mixes;
  }
  for (int64_t n = begin; n < end; ++n) {
    sort_by_level(owned.begin(n), owned.end(n), o, s);
    const A* x = o.x + n * o.x_row;
    for (int64_t p = 0; p < count; ++p) {
      A* row = s.errors + p * d;
      if (p == 0) {
        for (int64_t i = 0; i < d; ++i)
          row[i] = (o.bias == nullptr ? A(0) : static_cast<A>(o.bias[i])) - x[i];
      } else {
        for (int64_t i = 0; i < d; ++i) row[i] = row[i - d];
      }
      const int64_t from = p == 0 ? 0 : s.ends[p - 1];
      add_rows(row, d, s.rows + from, s.weights + from, s.ends[p] - from);
      o.squares[p * o.n + n] = sum_of_squares(row, d);
    }
    const A* last = s.errors + (count - 1) * d;
    A* error = o.error + n * d;
    for (int64_t i = 0; i < d; ++i) error[i] = last[i];
    for (int64_t g = 0; g < count; ++g) {
      A* out = o.mixed + (g * o.n + n) * d;
      for (int64_t i = 0; i < d; ++i) out[i] = A(0);
      add_rows(out, d, s.sources + g * count, s.shares + g * count, s.mixes[g]);
    }
  }
}
