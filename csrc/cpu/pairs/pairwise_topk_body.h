// SPDX-License-Identifier: Apache-2.0
// The screen of pairs: 16-bit products of a block of columns and tiles of rows, then the bound;
// compiled once per level.

#include "cpu/screen/screen_tile_body.h"

// appends what one column may form with the rows at..at + 16 of the tiles
static inline void screen_column(const ScreenSide& rows, int64_t at, const ScreenSide& cols,
                                 int64_t col, const float* products, PairList& list) {
  const float_vector scale = set(cols.scale[col]), p = set(cols.p[col]), q = set(cols.q[col]);
  for (int t = 0; t < kTileTokens; t += kLanes) {
    const int64_t i = at + t;
    const float_vector score = multiply(multiply(scale, load(rows.scale + i)), load(products + t));
    const float_vector slack = multiply_add(load(rows.p + i), p, multiply(load(rows.q + i), q));
    const float_vector strength = list.by_abs ? absolute(score) : score;
    // not below rather than at least: NaN passes
    unsigned mask = not_below(add(strength, slack), set(list.tau));
    if (__builtin_expect(mask == 0, 1)) continue;
    float strengths[kLanes], slacks[kLanes];
    store(strengths, strength);
    store(slacks, slack);
    for (; mask != 0; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      const int64_t row = i + lane;
      if (row >= rows.count) break;
      if (rows.rank != nullptr && rows.rank[row] >= cols.rank[col]) continue;
      if (list.size + 2 > list.capacity) list.make_room(list);
      const int32_t r = static_cast<int32_t>(rows.first + row),
                    c = static_cast<int32_t>(cols.first + col);
      list.pairs[list.size++] = {strengths[lane], slacks[lane], 0.f, r, c};
      if (list.mirrored && r != c)
        list.pairs[list.size++] = {strengths[lane], slacks[lane], 0.f, c, r};
    }
  }
}

// the panel of columns against tiles first_tile..last_tile; lowest[tile] is the lowest rank of a
// tile's rows. The tiles stay in L2 while columns stream
static void screen_pairs(const ScreenSide& rows, const int64_t* lowest, int64_t first_tile,
                         int64_t last_tile, const ScreenSide& cols, PairList& list) {
  alignas(64) float products[kBlockRows * kBlockTokens];
  const int64_t tile_stride = kTileTokens * rows.padded;
#if defined(MIK_AMX_TILES)
  configure_tiles();
#endif
  for (int64_t col = 0; col < cols.count; col += kBlockRows) {
    const int64_t wide = cols.count - col < kBlockRows ? cols.count - col : kBlockRows;
    int64_t highest = INT64_MAX;
    if (cols.rank != nullptr) {
      highest = INT64_MIN;
      for (int64_t c = col; c < col + wide; ++c)
        highest = cols.rank[c] > highest ? cols.rank[c] : highest;
    }
    for (int64_t tile = first_tile; tile < last_tile; tile += kBlockTiles) {
      if (cols.rank != nullptr) {
        int64_t low = lowest[tile];
        if (kBlockTiles == 2) low = lowest[tile + 1] < low ? lowest[tile + 1] : low;
        if (low >= highest) continue;
      }
      multiply_block(cols.numbers + col * cols.padded, cols.padded,
                     rows.numbers + tile * tile_stride, tile_stride, rows.padded / 2, products);
      for (int64_t c = 0; c < wide; ++c)
        for (int b = 0; b < kBlockTiles; ++b)
          screen_column(rows, (tile + b) * kTileTokens, cols, col + c,
                        products + c * kBlockTokens + b * kTileTokens, list);
    }
  }
#if defined(MIK_AMX_TILES)
  release_tiles();
#endif
}
