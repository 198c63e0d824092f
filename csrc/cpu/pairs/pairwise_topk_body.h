// SPDX-License-Identifier: Apache-2.0
// The screen of pairs: products of a block of columns and tiles of rows, then the bound; in 8 bits
// first where that pays. Compiled once per level.

#include "cpu/screen/screen_tile_body.h"
#if defined(MIK_DOT_BYTES)
#include "cpu/screen/coarse_body.h"
#endif

// what one row and one column may form
static inline void add_pair(const ScreenSide& rows, int64_t row, const ScreenSide& cols,
                            int64_t col, float strength, float slack, PairList& list) {
  if (row >= rows.count) return;
  if (rows.rank != nullptr && rows.rank[row] >= cols.rank[col]) return;
  if (list.size + 2 > list.capacity) list.make_room(list);
  const int32_t r = static_cast<int32_t>(rows.first + row),
                c = static_cast<int32_t>(cols.first + col);
  list.pairs[list.size++] = {strength, slack, 0.f, r, c};
  if (list.mirrored && r != c) list.pairs[list.size++] = {strength, slack, 0.f, c, r};
}

// appends what one column may form with the rows at..at + 16 of the tiles; returns how much
static inline int screen_column(const ScreenSide& rows, int64_t at, const ScreenSide& cols,
                                int64_t col, const float* products, PairList& list) {
  const float_vector scale = set(cols.scale[col]), p = set(cols.p[col]), q = set(cols.q[col]);
  int passed = 0;
  for (int t = 0; t < kTileTokens; t += kLanes) {
    const int64_t i = at + t;
    const float_vector score = multiply(multiply(scale, load(rows.scale + i)), load(products + t));
    const float_vector slack = multiply_add(load(rows.p + i), p, multiply(load(rows.q + i), q));
    const float_vector strength = list.by_abs ? absolute(score) : score;
    // not below rather than at least: NaN passes
    unsigned mask = not_below(add(strength, slack), set(list.tau));
    if (__builtin_expect(mask == 0, 1)) continue;
    passed += __builtin_popcount(mask);
    float strengths[kLanes], slacks[kLanes];
    store(strengths, strength);
    store(slacks, slack);
    for (; mask != 0; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      add_pair(rows, i + lane, cols, col, strengths[lane], slacks[lane], list);
    }
  }
  return passed;
}

// whether ranks forbid all pairs of a block of columns, whose highest rank is given, with the tiles
// of a block
static inline bool is_forbidden(const ScreenSide& cols, const int64_t* lowest, int64_t tile,
                                int64_t highest) {
  if (cols.rank == nullptr) return false;
  int64_t low = lowest[tile];
  if (kBlockTiles == 2) low = lowest[tile + 1] < low ? lowest[tile + 1] : low;
  return low >= highest;
}

// columns col..col + wide against tiles; returns how many pairs pass
static int64_t screen_columns(const ScreenSide& rows, const int64_t* lowest, int64_t first_tile,
                              int64_t last_tile, const ScreenSide& cols, int64_t col, int64_t wide,
                              int64_t highest, PairList& list) {
  alignas(64) float products[kBlockRows * kBlockTokens];
  const int64_t tile_stride = kTileTokens * rows.padded;
  int64_t passed = 0;
  for (int64_t tile = first_tile; tile < last_tile; tile += kBlockTiles) {
    if (is_forbidden(cols, lowest, tile, highest)) continue;
    multiply_block(cols.numbers + col * cols.padded, cols.padded, rows.numbers + tile * tile_stride,
                   tile_stride, rows.padded / 2, products);
    for (int64_t c = 0; c < wide; ++c)
      for (int b = 0; b < kBlockTiles; ++b)
        passed += screen_column(rows, (tile + b) * kTileTokens, cols, col + c,
                                products + c * kBlockTokens + b * kTileTokens, list);
  }
  return passed;
}

#if defined(MIK_DOT_BYTES)
// the rows in `queue` with one column again, in 16 bits
static inline void screen_again(const ScreenSide& rows, const ScreenSide& cols, int64_t col,
                                const int32_t* queue, int count, PairList& list) {
  int32_t products[kQueued + 4];
  multiply_some(cols.numbers + col * cols.padded, rows.rows, rows.padded, queue, count, products);
  const float scale = cols.scale[col], p = cols.p[col], q = cols.q[col];
  for (int i = 0; i < count; ++i) {
    const int64_t n = queue[i];
    const float score = scale * rows.scale[n] * static_cast<float>(products[i]);
    const float slack = rows.p[n] * p + rows.q[n] * q;
    const float strength = list.by_abs ? __builtin_fabsf(score) : score;
    if (!(strength + slack < list.tau)) add_pair(rows, n, cols, col, strength, slack, list);
  }
}

// as screen_columns, in 8 bits first
static int64_t screen_columns_coarse(const ScreenSide& rows, const int64_t* lowest,
                                     int64_t first_tile, int64_t last_tile, const ScreenSide& cols,
                                     int64_t col, int64_t wide, int64_t highest, PairList& list) {
  alignas(64) int32_t products[kBlockRows * kBlockTokens];
  // append_lanes writes a whole vector
  int32_t queues[kBlockRows][kQueued + kLanes];
  int counts[kBlockRows];
  const int64_t tile_stride = kTileTokens * rows.padded;
  const uint8_t* tiles = static_cast<const uint8_t*>(rows.bytes);
  const int8_t* bytes = static_cast<const int8_t*>(cols.bytes);
  int64_t passed = 0;
  for (int64_t tile = first_tile; tile < last_tile;) {
    const int64_t most = tile + kQueued / kTileTokens, stop = most < last_tile ? most : last_tile;
    for (int c = 0; c < kBlockRows; ++c) counts[c] = 0;
    for (; tile < stop; tile += kBlockTiles) {
      if (is_forbidden(cols, lowest, tile, highest)) continue;
      multiply_bytes(bytes + col * cols.padded, cols.padded, cols.start + col,
                     tiles + tile * tile_stride, tile_stride, rows.padded / 4, products);
      for (int64_t c = 0; c < wide; ++c) {
        const float_vector scale = set(cols.byte_scale[col + c]), p = set(cols.byte_p[col + c]),
                           q = set(cols.byte_q[col + c]);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          const int64_t i = tile * kTileTokens + v * kLanes;
          const float_vector units = to_float(load_ints(products + c * kBlockTokens + v * kLanes));
          const float_vector score = multiply(multiply(scale, load(rows.byte_scale + i)), units);
          const float_vector slack =
              multiply_add(load(rows.byte_p + i), p, multiply(load(rows.byte_q + i), q));
          const float_vector strength = list.by_abs ? absolute(score) : score;
          const unsigned mask = not_below(add(strength, slack), set(list.tau));
          if (__builtin_expect(mask != 0, 0))
            counts[c] += append_lanes(queues[c] + counts[c], mask, static_cast<int32_t>(i));
        }
      }
    }
    for (int64_t c = 0; c < wide; ++c) {
      passed += counts[c];
      if (counts[c] > 0) screen_again(rows, cols, col + c, queues[c], counts[c], list);
    }
  }
  return passed;
}
#endif

// the panel of columns against tiles first_tile..last_tile; lowest[tile] is the lowest rank of a
// tile's rows. The tiles stay in L2 while columns stream
static void screen_pairs(const ScreenSide& rows, const int64_t* lowest, int64_t first_tile,
                         int64_t last_tile, const ScreenSide& cols, PairList& list) {
#if defined(MIK_AMX_TILES)
  configure_tiles();
#endif
  const int64_t rows_here = kTileTokens * (last_tile - first_tile);
  int64_t coarse_cols = 0;
  for (int64_t col = 0; col < cols.count; col += kBlockRows) {
    const int64_t wide = cols.count - col < kBlockRows ? cols.count - col : kBlockRows;
    int64_t highest = INT64_MAX;
    if (cols.rank != nullptr) {
      highest = INT64_MIN;
      for (int64_t c = col; c < col + wide; ++c)
        highest = cols.rank[c] > highest ? cols.rank[c] : highest;
    }
#if defined(MIK_DOT_BYTES)
    if (list.course != nullptr) {
      const bool coarse = list.course->is_coarse();
      const int64_t passed = coarse ? screen_columns_coarse(rows, lowest, first_tile, last_tile,
                                                            cols, col, wide, highest, list)
                                    : screen_columns(rows, lowest, first_tile, last_tile, cols, col,
                                                     wide, highest, list);
      list.course->note(kBlockRows, kBlockRows * rows_here, passed);
      coarse_cols += coarse ? wide : 0;
      continue;
    }
#endif
    screen_columns(rows, lowest, first_tile, last_tile, cols, col, wide, highest, list);
  }
  if (list.course != nullptr)
    note_screened(coarse_cols * rows_here, (cols.count - coarse_cols) * rows_here);
#if defined(MIK_AMX_TILES)
  release_tiles();
#endif
}
