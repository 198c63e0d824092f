// SPDX-License-Identifier: Apache-2.0
// 8-bit products of a block of rows and tiles of 16 others, and 16-bit products of the few pairs
// that pass; part of the bodies that screen, after screen_tile_body.h.

#include "cpu/simd/bytes_body.h"

constexpr int kVectors = kTileTokens / kLanes * kBlockTiles;
// tokens between two looks at what passed, and what is kept of them per row
constexpr int kQueued = 1024;

// out[r][t] = start[r] + <row r, token t> in quantised units; tokens are stored 128 too large,
// which `start` makes good. Not inlined: GCC 12 would spill the sums (231 -> 186 GMAC/s, one Zen 4
// core)
__attribute__((noinline)) static void multiply_bytes(const int8_t* rows, int64_t row_stride,
                                                     const int32_t* start, const uint8_t* tile,
                                                     int64_t tile_stride, int64_t quads,
                                                     int32_t* out) {
  int_vector sums[kBlockRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sums[r][v] = set_int(start[r]);
  for (int64_t quad = 0; quad < quads; ++quad) {
    int_vector tokens[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v)
      tokens[v] = load_bytes(tile + v / (kTileTokens / kLanes) * tile_stride +
                             (quad * kTileTokens + v % (kTileTokens / kLanes) * kLanes) * 4);
#pragma GCC unroll 16
    for (int r = 0; r < kBlockRows; ++r) {
      const int_vector feature = broadcast_quad(rows + r * row_stride + quad * 4);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v)
        sums[r][v] = add_quad_products(sums[r][v], tokens[v], feature);
      // as in multiply_block
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) pin(sums[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) store_ints(out + r * kBlockTokens + v * kLanes, sums[r][v]);
}

// out[i] = <row, rows of `others` that `which` names>, four at a time while the row stays in L1;
// room for 3 more is wanted in `out`
static inline void multiply_some(const uint16_t* row, const uint16_t* others, int64_t padded,
                                 const int32_t* which, int count, int32_t* out) {
  for (int i = 0; i < count; i += 4) {
    const uint16_t* other[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      other[j] = others + which[i + j < count ? i + j : count - 1] * padded;
    int_vector sums[4] = {zero(), zero(), zero(), zero()};
    for (int64_t e = 0; e < padded; e += 2 * kLanes) {
      const int_vector here = load_pairs(row + e);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        sums[j] = add_pair_products(sums[j], load_pairs(other[j] + e), here);
    }
    sum_four(sums[0], sums[1], sums[2], sums[3], out + i);
  }
}
