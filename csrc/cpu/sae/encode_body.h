// SPDX-License-Identifier: Apache-2.0
// The screen of encode: products of a feature block and a token tile, then the bound; in 8 bits
// first where that pays. Compiled per level.
//
// Found.add(token, feature, score, slack) takes what may be selected: what may reach its feature's
// floor if Found::kFloors, else Found.bounds(tokens, feature, n) of tokens n, n + 1, .., or only
// what may exceed that if Found::kStrict. A token's features come in ascending order.

#include "cpu/screen/screen_tile_body.h"
#if defined(MIK_DOT_BYTES)
#include "cpu/screen/coarse_body.h"
#endif

struct Bracket {
  float_vector score, slack;
};

// the scores of feature `row` with tokens n.., from products in quantised units
static inline Bracket bracket(const FeatureTerms& f, int64_t row, const TokenTerms& x, int64_t n,
                              float_vector products) {
  const float_vector units = multiply(set(f.scale[row]), load(x.scale + n));
  return {multiply(multiply_add(products, units, set(f.bias[row])), set(f.rank[row])),
          multiply_add(load(x.error + n), set(f.p[row]),
                       multiply_add(load(x.norm + n), set(f.q[row]), set(f.r[row])))};
}

// the lanes that may be selected
template <class Found>
static inline unsigned passing(const Bracket& of, const Panel& panel, int64_t row,
                               const Tokens& tokens, int64_t n, const Found& found) {
  const float_vector highest = add(of.score, of.slack);
  // not below rather than at least: NaN passes
  if constexpr (Found::kFloors) {
    return not_below(highest, set(panel.floor[row]));
  } else {
    const float_vector bound = load(found.bounds(tokens, panel.first_feature + row, n));
    return Found::kStrict ? not_at_most(highest, bound) : not_below(highest, bound);
  }
}

// what one feature may contribute to tokens first..first + 16; returns how many pass
template <class Found>
static inline int screen_tokens(const Panel& panel, int64_t row, const Tokens& tokens,
                                const float* products, int64_t first, Found& found) {
  int passed = 0;
  for (int t = 0; t < kTileTokens; t += kLanes) {
    const int64_t n = first + t;
    const Bracket of = bracket(panel.terms, row, tokens.terms, n, load(products + t));
    unsigned mask = passing(of, panel, row, tokens, n, found);
    if (__builtin_expect(mask == 0, 1)) continue;
    passed += __builtin_popcount(mask);
    float scores[kLanes], slacks[kLanes];
    store(scores, of.score);
    store(slacks, of.slack);
    for (; mask != 0; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      const int64_t token = n + lane;
      if (token >= tokens.count) break;
      found.add(token, panel.first_feature + row, scores[lane], slacks[lane]);
    }
  }
  return passed;
}

// rows row..row + kBlockRows of the panel against token tiles; returns how many pairs pass
template <class Found>
static int64_t screen_rows(const Panel& panel, int64_t row, const Tokens& tokens,
                           int64_t first_tile, int64_t last_tile, Found& found) {
  alignas(64) float products[kBlockRows * kBlockTokens];
  const int64_t rows = panel.count - row < kBlockRows ? panel.count - row : kBlockRows;
  int64_t passed = 0;
  for (int64_t tile = first_tile; tile < last_tile; tile += kBlockTiles) {
    multiply_block(panel.rows + row * panel.row_stride, panel.row_stride,
                   tokens.tiles + tile * tokens.tile_stride, tokens.tile_stride, tokens.pairs,
                   products);
    for (int64_t r = 0; r < rows; ++r)
      for (int b = 0; b < kBlockTiles; ++b)
        passed +=
            screen_tokens(panel, row + r, tokens, products + r * kBlockTokens + b * kTileTokens,
                          (tile + b) * kTileTokens, found);
  }
  return passed;
}

#if defined(MIK_DOT_BYTES)
// the tokens in `queue` again, in 16 bits
template <class Found>
static inline void screen_again(const Panel& panel, int64_t row, const Tokens& tokens,
                                const int32_t* queue, int count, Found& found) {
  int32_t products[kQueued + 4];
  multiply_some(panel.rows + row * panel.row_stride, tokens.rows, panel.row_stride, queue, count,
                products);
  const FeatureTerms& f = panel.terms;
  const TokenTerms& x = tokens.terms;
  const float scale = f.scale[row], bias = f.bias[row], rank = f.rank[row], p = f.p[row],
              q = f.q[row], r = f.r[row];
  for (int i = 0; i < count; ++i) {
    const int64_t n = queue[i];
    const float score = (static_cast<float>(products[i]) * (scale * x.scale[n]) + bias) * rank;
    const float slack = x.error[n] * p + (x.norm[n] * q + r), highest = score + slack;
    bool out;
    if constexpr (Found::kFloors) {
      out = highest < panel.floor[row];
    } else {
      const float bound = *found.bounds(tokens, panel.first_feature + row, n);
      out = Found::kStrict ? highest <= bound : highest < bound;
    }
    if (!out && n < tokens.count) found.add(n, panel.first_feature + row, score, slack);
  }
}

// as screen_rows, in 8 bits first: what passes is queued by row while a few tiles pass, and meets
// what was learned in between at its second screen
template <class Found>
static int64_t screen_rows_coarse(const Panel& panel, int64_t row, const Tokens& tokens,
                                  int64_t first_tile, int64_t last_tile, Found& found) {
  alignas(64) int32_t products[kBlockRows * kBlockTokens];
  // append_lanes writes a whole vector
  int32_t queues[kBlockRows][kQueued + kLanes];
  int counts[kBlockRows];
  const int64_t rows = panel.count - row < kBlockRows ? panel.count - row : kBlockRows;
  int64_t passed = 0;
  for (int64_t tile = first_tile; tile < last_tile;) {
    const int64_t most = tile + kQueued / kTileTokens, stop = most < last_tile ? most : last_tile;
    for (int r = 0; r < kBlockRows; ++r) counts[r] = 0;
    for (; tile < stop; tile += kBlockTiles) {
      multiply_bytes(panel.bytes + row * panel.row_stride, panel.row_stride, panel.start + row,
                     tokens.byte_tiles + tile * tokens.tile_stride, tokens.tile_stride,
                     tokens.pairs / 2, products);
      for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          const int64_t n = tile * kTileTokens + v * kLanes;
          const float_vector units = to_float(load_ints(products + r * kBlockTokens + v * kLanes));
          const Bracket of = bracket(panel.byte_terms, row + r, tokens.byte_terms, n, units);
          const unsigned mask = passing(of, panel, row + r, tokens, n, found);
          if (__builtin_expect(mask != 0, 0))
            counts[r] += append_lanes(queues[r] + counts[r], mask, static_cast<int32_t>(n));
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      passed += counts[r];
      if (counts[r] > 0) screen_again(panel, row + r, tokens, queues[r], counts[r], found);
    }
  }
  return passed;
}
#endif

// one panel against token tiles first_tile..last_tile. The token block stays in L2 while features
// stream; a block of feature rows stays in L1 while the tiles pass over it
template <class Found>
static void screen(const Panel& panel, const Tokens& tokens, int64_t first_tile, int64_t last_tile,
                   Found& found) {
#if defined(MIK_AMX_TILES)
  configure_tiles();
#endif
  const int64_t tokens_here = kTileTokens * (last_tile - first_tile);
  int64_t coarse_rows = 0;
  for (int64_t row = 0; row < panel.count; row += kBlockRows) {
#if defined(MIK_DOT_BYTES)
    if (tokens.courses != nullptr) {
      CoarseCourse& course = tokens.courses[first_tile];
      const bool coarse = course.is_coarse();
      const int64_t passed =
          coarse ? screen_rows_coarse(panel, row, tokens, first_tile, last_tile, found)
                 : screen_rows(panel, row, tokens, first_tile, last_tile, found);
      course.note(kBlockRows, kBlockRows * tokens_here, passed);
      coarse_rows += coarse ? kBlockRows : 0;
      continue;
    }
#endif
    screen_rows(panel, row, tokens, first_tile, last_tile, found);
  }
  if (tokens.courses != nullptr)
    note_screened(coarse_rows * tokens_here, (panel.count - coarse_rows) * tokens_here);
#if defined(MIK_AMX_TILES)
  release_tiles();
#endif
}
