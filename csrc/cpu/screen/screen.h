// SPDX-License-Identifier: Apache-2.0
// Screening in 16 bits, and in 8 bits before that: mikernels/ops/sae/encode.py has the method and
// its proof. What its users share.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <limits>

namespace mik {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// rows are packed 16 to a tile, as [pairs of numbers][16 rows][2]
constexpr int kTileTokens = 16;

// norms in this range keep every screened quantity far from fp32's limits
constexpr double kSmallestNorm = 0x1p-40, kLargestNorm = 0x1p40;

// rows of one panel are padded to the largest register block, dimensions to one AMX tile row
constexpr int64_t kRowPadding = 96, kDimPadding = 32, kTokenPadding = 32;

// longest rows of the coarse screen
constexpr int64_t kCoarseDims = 1 << 15;

// u = 2^-24: the share of a bound that covers fp32 evaluation, and the norms' own rounding
constexpr double kEvaluation = 16 * 0x1p-24, kUp = 1 + 0x1p-20;

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// row = scale * q + error with 16-bit q; norms of the row and of the error
struct QuantisedRow {
  double scale, norm, error;
};

QuantisedRow quantise(const float* row, int64_t d, uint16_t* out, int64_t padded);

// a row in 16 bits (fine) and in 8 (coarse), and the sum of its 8-bit numbers
struct TwiceQuantised {
  QuantisedRow fine, coarse;
  int32_t sum;
};

// where the level has dot products of bytes. Their sums stay below 2^31 up to 44,000 numbers
bool has_coarse_screen(int64_t padded);

// pairs screened in 8 bits first, and in 16 where 8 were to be had, since the process began: what
// tests and benchmarks know of it
struct ScreenedSoFar {
  int64_t coarse, fine;
};
ScreenedSoFar screened_so_far();
void note_screened(int64_t coarse, int64_t fine);

// the row of row[i] columns[i]; `scratch` has room for `padded` numbers
TwiceQuantised quantise_twice(const float* row, const float* columns, int64_t d, int64_t padded,
                              float* scratch, int8_t* coarse, uint16_t* fine);

// a quantised row into its place in the tiles that hold it; bytes as [quads][16 rows][4], 128 added
void into_tile(const uint16_t* row, int64_t padded, int64_t n, uint16_t* tiles);
void into_byte_tile(const int8_t* row, int64_t padded, int64_t n, uint8_t* tiles);

// the share of |x^| |w^| that rounding adds to a product of `padded` numbers
double screen_rounding(int64_t padded);

// tiles of rows that stay in the second-level cache while others stream
int64_t tiles_in_cache(int64_t padded);

// <x, w> in fp64, its order the same at every level
double exact_dot(const double* x, const float* w, int64_t d);
double exact_dot(const double* x, const torch::headeronly::BFloat16* w, int64_t d);
double exact_dot(const double* x, const torch::headeronly::Half* w, int64_t d);

// <w, x[i]> of one row with `count` others, in that order too
void exact_dots(const float* w, const float* const* x, int64_t count, int64_t d, double* out);

// exact_dot of `count` rows, several at a time
void exact_dots(const double* x, const float* const* rows, int64_t count, int64_t d, double* out);
void exact_dots(const double* x, const torch::headeronly::BFloat16* const* rows, int64_t count,
                int64_t d, double* out);
void exact_dots(const double* x, const torch::headeronly::Half* const* rows, int64_t count,
                int64_t d, double* out);

}  // namespace mik
