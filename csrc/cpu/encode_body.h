// SPDX-License-Identifier: Apache-2.0
// The screen: 16-bit products of a feature block and a token tile, then the bound; compiled per
// level.

#include "cpu/vectors_body.h"

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
      // pins the order: GCC 12 otherwise hoists all broadcasts and spills the sums (35 against 45 GMAC/s, one Zen 3 core)
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

// appends to the lists what one feature may contribute to tokens first..first + 16
static inline void screen_tokens(const Panel& panel, int64_t row, const Tokens& tokens,
                                 const float* products, int64_t first, const Lists& lists) {
  const float_vector scale = set(panel.scale[row]), bias = set(panel.bias[row]),
                     rank = set(panel.rank[row]), p = set(panel.p[row]), q = set(panel.q[row]),
                     r = set(panel.r[row]);
  for (int t = 0; t < kTileTokens; t += kLanes) {
    const int64_t n = first + t;
    const float_vector units = multiply(scale, load(tokens.sx + n));
    const float_vector score = multiply(multiply_add(load(products + t), units, bias), rank);
    const float_vector slack =
        multiply_add(load(tokens.ex + n), p, multiply_add(load(tokens.nx + n), q, r));
    // not below rather than at least: NaN passes
    unsigned mask = not_below(add(score, slack), load(tokens.tau + n));
    if (__builtin_expect(mask == 0, 1)) continue;
    float scores[kLanes], slacks[kLanes];
    store(scores, score);
    store(slacks, slack);
    for (; mask != 0; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      const int64_t token = n + lane;
      if (token >= tokens.count) break;
      Candidate* list = lists.candidates + token * lists.capacity;
      list[lists.sizes[token]++] = {scores[lane], slacks[lane], 0.f,
                                    static_cast<int32_t>(panel.first_feature + row)};
      if (lists.sizes[token] == lists.capacity) lists.make_room(lists.context, token);
    }
  }
}

// one panel against token tiles first_tile..last_tile. The token block stays in L2 while features
// stream; a block of feature rows stays in L1 while the tiles pass over it
static void screen(const Panel& panel, const Tokens& tokens, int64_t first_tile, int64_t last_tile,
                   const Lists& lists) {
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
                        (tile + b) * kTileTokens, lists);
    }
  }
#if defined(MIK_AMX_TILES)
  release_tiles();
#endif
}

typedef double doubles __attribute__((vector_size(MIK_VECTOR_BYTES)));
typedef float half_floats __attribute__((vector_size(MIK_VECTOR_BYTES / 2)));
constexpr int kDoubles = MIK_VECTOR_BYTES / 8;

template <class W>
static inline doubles load_doubles(const W* at) {
  half_floats narrow;
  if constexpr (sizeof(W) == sizeof(float)) {
    __builtin_memcpy(&narrow, at, sizeof(narrow));
  } else {
    for (int l = 0; l < kDoubles; ++l) narrow[l] = static_cast<float>(at[l]);
  }
  return __builtin_convertvector(narrow, doubles);
}

// <x, w> in fp64 with a fixed order of 16 sums: products of two fp32 numbers are exact in fp64, so
// every level returns the same bits
template <class W>
static double exact_dot(const double* x, const W* w, int64_t d) {
  constexpr int vectors = 16 / kDoubles;
  doubles sums[vectors] = {};
  int64_t i = 0;
  for (; i + 16 <= d; i += 16) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      doubles a;
      __builtin_memcpy(&a, x + i + v * kDoubles, sizeof(a));
      sums[v] += a * load_doubles(w + i + v * kDoubles);
    }
  }
  double lane_sums[16];
  __builtin_memcpy(lane_sums, sums, sizeof(lane_sums));
  for (int64_t j = 0; i < d; ++i, ++j)
    lane_sums[j] += x[i] * static_cast<double>(static_cast<float>(w[i]));
  for (int width = 8; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lane_sums[j] += lane_sums[j + width];
  return lane_sums[0];
}

// row = scale * q + error with 16-bit q; returns norms in fp64. bf16 keeps 8 bits of every element,
// int16 keeps 15 bits of the largest possible row norm
struct Quantised {
  double scale, norm, error;
};

static Quantised quantise_row(const float* row, int64_t d, uint16_t* out, int64_t padded) {
  double squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < d; ++i) squares += static_cast<double>(row[i]) * row[i];
  const double norm = __builtin_sqrt(squares);
  for (int64_t i = d; i < padded; ++i) out[i] = 0;
  // outside this range (or NaN) the bound would meet fp32's limits: let everything pass instead
  if (!(norm >= kSmallestNorm && norm <= kLargestNorm)) {
    for (int64_t i = 0; i < d; ++i) out[i] = 0;
    return {norm == 0 ? 0. : 1., norm, norm == 0 ? 0. : __builtin_inf()};
  }
  double errors = 0;
#if defined(MIK_AMX_TILES)
  // a power of two, so that scaling is exact: the norm comes to lie in 1..2
  uint64_t exponent;
  __builtin_memcpy(&exponent, &norm, 8);
  exponent &= 0x7ff0000000000000u;
  double scale;
  __builtin_memcpy(&scale, &exponent, 8);
  const float inverse = static_cast<float>(1. / scale);
#pragma omp simd reduction(+ : errors)
  for (int64_t i = 0; i < d; ++i) {
    const float value = row[i] * inverse;
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    float kept;
    __builtin_memcpy(&kept, &rounded, 4);
    out[i] = static_cast<uint16_t>(rounded >> 16);
    const double error = static_cast<double>(value) - kept;
    errors += error * error;
  }
#else
  const double scale = norm / 32000.;
  const float inverse = static_cast<float>(1. / scale), step = static_cast<float>(scale);
#pragma omp simd reduction(+ : errors)
  for (int64_t i = 0; i < d; ++i) {
    // adding 1.5 * 2^23 rounds to an integer in the low mantissa bits
    const float shifted = row[i] * inverse + 12582912.f;
    const float units = shifted - 12582912.f;
    out[i] = static_cast<uint16_t>(static_cast<int16_t>(static_cast<int32_t>(units)));
    const double error = static_cast<double>(row[i]) - static_cast<double>(step) * units;
    errors += error * error;
  }
  return {static_cast<double>(step), norm, __builtin_sqrt(errors)};
#endif
#if defined(MIK_AMX_TILES)
  return {scale, norm, __builtin_sqrt(errors) * scale};
#endif
}
