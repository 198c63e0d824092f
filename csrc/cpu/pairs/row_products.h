// SPDX-License-Identifier: Apache-2.0
// Products of rows with rows: the core of pairwise products, edge scores, Gram matrices and norms.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "common.h"
#include "cpu/pairs/scratch.h"
#include "cpu/simd/scalar.h"

namespace mik {

// acc[i, j] += <a[i], b[j]> over d numbers for i < rows, j < cols; rows of acc are ld apart. With
// `limits`, column j wants the rows first_row + i < limits[j] only; what else acc receives is to be
// ignored
template <class A>
struct RowProducts {
  const A* const* a;
  int64_t rows;
  const A* const* b;
  int64_t cols, d, chunk;
  const int64_t* limits;
  int64_t first_row;
  double* acc;
  int64_t ld;
};

void block_products(const RowProducts<float>& of);
void block_products(const RowProducts<double>& of);

// out[i, j] += weight sums[i, j] for sums [rows, cols], and with `mirrored`, where out[j, i] is,
// that too; rows of out are `row` apart, its columns dense
void add_scores(const double* sums, int64_t rows, int64_t cols, double weight, int64_t row,
                float* out, float* mirrored);
void add_scores(const double* sums, int64_t rows, int64_t cols, double weight, int64_t row,
                double* out, double* mirrored);

// sums[i] += a[i] b[i]
void add_products(const double* a, const double* b, int64_t count, double* sums);

double sum_squares(const double* of, int64_t count);

// d numbers `stride` apart, times scale[0:d] if there is one, as a dense row
void copy_row(const float* from, int64_t stride, const float* scale, int64_t scale_stride,
              int64_t d, float* to);
void copy_row(const double* from, int64_t stride, const double* scale, int64_t scale_stride,
              int64_t d, double* to);
void copy_row(const torch::headeronly::BFloat16* from, int64_t stride,
              const torch::headeronly::BFloat16* scale, int64_t scale_stride, int64_t d, float* to);
void copy_row(const torch::headeronly::Half* from, int64_t stride,
              const torch::headeronly::Half* scale, int64_t scale_stride, int64_t d, float* to);

// rows of an operand where they lie: row i, number k is base[i row + k inner] scale[k
// scale_stride]; with `index`, row index[i] takes the place of row i
template <class T>
struct Rows {
  const T* base;
  int64_t row, inner;
  const T* scale = nullptr;
  int64_t scale_stride = 0;
  const int64_t* index = nullptr;

  const T* at(int64_t i) const { return base + (index == nullptr ? i : index[i]) * row; }

  bool in_place() const {
    return std::is_same_v<T, accumulator_t<T>> && inner == 1 && scale == nullptr;
  }
};

// a block of b stays in the second-level cache (512 KB) while rows of a pass over it
constexpr int64_t kPairCols = 96, kChunk = 768;
// rows that are read in place may be many, copied ones share that cache
constexpr int64_t kPairRows = 256, kCopiedRows = 64;

// numbers of a row that are multiplied at a time: equal parts of at most kChunk
inline int64_t chunk_of(int64_t d) {
  const int64_t parts = (d + kChunk - 1) / kChunk;
  return d == 0 ? 16 : ((d + parts - 1) / parts + 15) / 16 * 16;
}

// a rectangle of pairs
struct Block {
  int64_t row, rows, col, cols;
};

// one thread's products: sums of at most kChunk numbers in the accumulator type, the rest in fp64.
// How pairs are shared out does not change a bit of the result
template <class T>
class BlockProduct {
 public:
  using A = accumulator_t<T>;

  // acc[i, j] += <a[block.row + i], b[block.col + j]>, acc [rows, cols]; `limits` of the block's
  // columns as for block_products. Operands are of T or of the accumulator type
  template <class L, class R>
  void add(const Rows<L>& a, const Rows<R>& b, const Block& block, int64_t d, const int64_t* limits,
           double* acc) {
    const int64_t chunk = chunk_of(d);
    const int64_t span = std::max<int64_t>(kSpan / std::max<int64_t>(block.cols, 1) / chunk, 1) * chunk;
    for (int64_t k = 0; k < d; k += span) {
      const int64_t here = std::min(span, d - k);
      const bool copy = block.rows > kInPlaceRows && shares_sets(b.row);
      const A* const* right = dense(b, block.col, block.cols, k, here, copy, right_);
      const A* const* left = dense(a, block.row, block.rows, k, here, false, left_);
      block_products(RowProducts<A>{.a = left,
                                    .rows = block.rows,
                                    .b = right,
                                    .cols = block.cols,
                                    .d = here,
                                    .chunk = chunk,
                                    .limits = limits,
                                    .first_row = block.row,
                                    .acc = acc,
                                    .ld = block.cols});
    }
  }

 private:
  // columns that meet more rows than this are copied, even where they could be read in place, when
  // they are half a page or a multiple of it apart: they would share few cache sets
  static constexpr int64_t kInPlaceRows = 4, kSpan = 96 * 768;

  static bool shares_sets(int64_t row) { return row * sizeof(A) % 2048 == 0; }

  struct Copies {
    Scratch<A> numbers;
    std::vector<const A*> rows;
  };

  template <class L>
  static const A* const* dense(const Rows<L>& of, int64_t first, int64_t count, int64_t k,
                               int64_t d, bool copy, Copies& copies) {
    copies.rows.resize(count);
    if constexpr (std::is_same_v<L, A>) {
      if (of.in_place() && !copy) {
        for (int64_t i = 0; i < count; ++i) copies.rows[i] = of.at(first + i) + k;
        return copies.rows.data();
      }
    }
    // a cache line more than a power of two, for the sets' sake
    const int64_t ld = (d + 15) / 16 * 16 + 16;
    A* const numbers = copies.numbers.take(count * ld);
    for (int64_t i = 0; i < count; ++i) {
      A* to = numbers + i * ld;
      const L* scale = of.scale == nullptr ? nullptr : of.scale + k * of.scale_stride;
      copy_row(of.at(first + i) + k * of.inner, of.inner, scale, of.scale_stride, d, to);
      copies.rows[i] = to;
    }
    return copies.rows.data();
  }

  Copies left_, right_;
};

// n x m pairs in blocks, as many for every thread where there are enough rows (5 blocks on two
// threads took 1.2 times as long as 6), of a multiple of `whole` rows; those without a pair
// row < limits[col] are left out
inline std::vector<Block> blocks_of(int64_t n, int64_t m, int64_t most_rows, int64_t most_cols,
                                    const int64_t* limits, int64_t whole = 4) {
  std::vector<Block> blocks;
  if (n == 0 || m == 0) return blocks;
  const int64_t across = (m + most_cols - 1) / most_cols;
  const int64_t threads = torch::stable::get_num_threads();
  int64_t down = (n + most_rows - 1) / most_rows;
  while (down * across % threads != 0 && down < (n + whole - 1) / whole) ++down;
  const int64_t rows = ((n + down - 1) / down + whole - 1) / whole * whole;
  for (int64_t i = 0; i < n; i += rows) {
    for (int64_t j = 0; j < m; j += most_cols) {
      const int64_t cols = std::min(most_cols, m - j);
      if (limits == nullptr || *std::max_element(limits + j, limits + j + cols) > i)
        blocks.push_back({i, std::min(rows, n - i), j, cols});
    }
  }
  return blocks;
}

}  // namespace mik
