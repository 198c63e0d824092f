// SPDX-License-Identifier: Apache-2.0
// The screen of encode: 16-bit products of a feature block and a token tile, then the bound;
// compiled per level. Found.add(token, feature, score, slack) takes what may be selected: what may
// reach its feature's floor if Found::kFloors, else Found.bounds(tokens, feature, n) of tokens n,
// n + 1, ..

#include "cpu/screen/screen_tile_body.h"

// what one feature may contribute to tokens first..first + 16
template <class Found>
static inline void screen_tokens(const Panel& panel, int64_t row, const Tokens& tokens,
                                 const float* products, int64_t first, Found& found) {
  const float_vector scale = set(panel.scale[row]), bias = set(panel.bias[row]),
                     rank = set(panel.rank[row]), p = set(panel.p[row]), q = set(panel.q[row]),
                     r = set(panel.r[row]);
  const int64_t feature = panel.first_feature + row;
  float_vector bound;
  if constexpr (Found::kFloors) bound = set(panel.floor[row]);
  for (int t = 0; t < kTileTokens; t += kLanes) {
    const int64_t n = first + t;
    const float_vector units = multiply(scale, load(tokens.sx + n));
    const float_vector score = multiply(multiply_add(load(products + t), units, bias), rank);
    const float_vector slack =
        multiply_add(load(tokens.ex + n), p, multiply_add(load(tokens.nx + n), q, r));
    if constexpr (!Found::kFloors) bound = load(found.bounds(tokens, feature, n));
    // not below rather than at least: NaN passes
    unsigned mask = not_below(add(score, slack), bound);
    if (__builtin_expect(mask == 0, 1)) continue;
    float scores[kLanes], slacks[kLanes];
    store(scores, score);
    store(slacks, slack);
    for (; mask != 0; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      const int64_t token = n + lane;
      if (token >= tokens.count) break;
      found.add(token, feature, scores[lane], slacks[lane]);
    }
  }
}

// one panel against token tiles first_tile..last_tile. The token block stays in L2 while features
// stream; a block of feature rows stays in L1 while the tiles pass over it
template <class Found>
static void screen(const Panel& panel, const Tokens& tokens, int64_t first_tile, int64_t last_tile,
                   Found& found) {
  alignas(64) float products[kBlockRows * kBlockTokens];
#if defined(MIK_AMX_TILES)
  configure_tiles();
#endif
  for (int64_t row = 0; row < panel.count; row += kBlockRows) {
    const int64_t rows = panel.count - row < kBlockRows ? panel.count - row : kBlockRows;
    for (int64_t tile = first_tile; tile < last_tile; tile += kBlockTiles) {
      multiply_block(panel.rows + row * panel.row_stride, panel.row_stride,
                     tokens.tiles + tile * tokens.tile_stride, tokens.tile_stride, tokens.pairs,
                     products);
      for (int64_t r = 0; r < rows; ++r)
        for (int b = 0; b < kBlockTiles; ++b)
          screen_tokens(panel, row + r, tokens, products + r * kBlockTokens + b * kTileTokens,
                        (tile + b) * kTileTokens, found);
    }
  }
#if defined(MIK_AMX_TILES)
  release_tiles();
#endif
}
