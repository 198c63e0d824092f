// SPDX-License-Identifier: Apache-2.0
// 16-bit products of a block of rows and tiles of 16 others; part of the bodies that screen.

#include "cpu/simd/vectors_body.h"

// rows (features) and tiles (tokens / 16) of one register block
#if defined(MIK_AMX_TILES)
constexpr int kBlockRows = 32, kBlockTiles = 2;
#elif MIK_VECTOR_BYTES == 64
constexpr int kBlockRows = 12, kBlockTiles = 2;  // 24 sums, 2 tokens, 1 broadcast of 32 registers
#elif MIK_VECTOR_BYTES == 32
constexpr int kBlockRows = 6, kBlockTiles = 1;  // 12 sums, 2 tokens, 1 broadcast, 1 product of 16
#else
constexpr int kBlockRows = 2, kBlockTiles = 1;
#endif
constexpr int kBlockTokens = kBlockTiles * kTileTokens;

// out[r][t] = <row r, token t> in quantised units
static inline void multiply_block(const uint16_t* rows, int64_t row_stride, const uint16_t* tile,
                                  int64_t tile_stride, int64_t pairs, float* out) {
#if defined(MIK_AMX_TILES)
  multiply_tiles(rows, row_stride, tile, tile_stride, pairs, out);
#else
  constexpr int vectors = kTileTokens / kLanes * kBlockTiles;
  int_vector sums[kBlockRows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) sums[r][v] = zero();
  for (int64_t pair = 0; pair < pairs; ++pair) {
    int_vector tokens[vectors];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v)
      tokens[v] = load_pairs(tile + v / (kTileTokens / kLanes) * tile_stride +
                             (pair * kTileTokens + v % (kTileTokens / kLanes) * kLanes) * 2);
#pragma GCC unroll 16
    for (int r = 0; r < kBlockRows; ++r) {
      const int_vector feature = broadcast_pair(rows + r * row_stride + pair * 2);
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v)
        sums[r][v] = add_pair_products(sums[r][v], feature, tokens[v]);
      // pins the order: GCC 12 otherwise hoists all broadcasts and spills the sums (35 against 45
      // GMAC/s, one Zen 3 core)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) pin(sums[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v)
      store(out + r * kBlockTokens + v * kLanes, to_float(sums[r][v]));
#endif
}
