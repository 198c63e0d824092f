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

// The same where the numbers of a row of b lie across memory: b is [d, cols] then, packed by
// pack_across. Rows of a are given as above, or packed. `next` are where `count` pairs of pieces of
// memory begin, `stride` bytes apart, that will be read after this
template <class A>
struct AcrossProducts {
  const A* const* a;
  const A* packed;
  int64_t rows;
  const A* b;
  int64_t cols, d;
  const int64_t* limits;
  int64_t first_row;
  double* acc;
  int64_t ld;
  const char* next[2];
  int64_t stride, count;
};

void across_products(const AcrossProducts<float>& of);
void across_products(const AcrossProducts<double>& of);

// [d, count] numbers, rows `stride` apart, as the columns or the rows of across_products; `to` has
// room for d of kPackedMore columns more
constexpr int64_t kPackedMore = 16;
void pack_across(const float* from, int64_t stride, int64_t count, int64_t d, bool rows, float* to);
void pack_across(const double* from, int64_t stride, int64_t count, int64_t d, bool rows,
                 double* to);
void pack_across(const torch::headeronly::BFloat16* from, int64_t stride, int64_t count, int64_t d,
                 bool rows, float* to);
void pack_across(const torch::headeronly::Half* from, int64_t stride, int64_t count, int64_t d,
                 bool rows, float* to);

// out[i, j] += weight sums[i, j] for rows x cols sums, and with `mirrored`, where out[j, i] is,
// that too; rows of sums are ld apart, those of out `row`, and columns are dense
void add_scores(const double* sums, int64_t ld, int64_t rows, int64_t cols, double weight,
                int64_t row, float* out, float* mirrored);
void add_scores(const double* sums, int64_t ld, int64_t rows, int64_t cols, double weight,
                int64_t row, double* out, double* mirrored);

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

  // numbers of different rows lie together, those of a row do not
  bool across() const { return row == 1 && inner != 1 && scale == nullptr && index == nullptr; }
};

// columns that lie across are met in wider blocks: what is read of each is short
constexpr int64_t kAcrossCols = 240;
// a block of b stays in the second-level cache (512 KB) while rows of a pass over it
constexpr int64_t kPairCols = 96, kChunk = 768;
// rows that are read in place may be many, copied ones share that cache
constexpr int64_t kPairRows = 256, kCopiedRows = 64;

// terms of one running sum of a product across: its error is estimated at 1.5 times that of 48 and
// a sum of 16 lanes, for terms of random signs; an eager product's runs over more. At 64 writing
// the sums would take 9 % of the time, here 5
constexpr int64_t kAcrossChunk = 128;

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
    if (b.across()) return add_across(a, b, block, d, limits, acc);
    const int64_t chunk = chunk_of(d);
    const int64_t span =
        std::max<int64_t>(kSpan / std::max<int64_t>(block.cols, 1) / chunk, 1) * chunk;
    for (int64_t k = 0; k < d; k += span) {
      const int64_t here = std::min(span, d - k);
      const bool copy = block.rows > kInPlaceRows && crowded(b.row, block.cols);
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
  template <class L, class R>
  void add_across(const Rows<L>& a, const Rows<R>& b, const Block& block, int64_t d,
                  const int64_t* limits, double* acc) {
    const int64_t parts = std::max<int64_t>((d + kAcrossChunk - 1) / kAcrossChunk, 1);
    const int64_t chunk = (d + parts - 1) / parts;
    for (int64_t k = 0; k < d; k += chunk) {
      const int64_t here = std::min(chunk, d - k);
      A* const right = right_.numbers.take((block.cols + kPackedMore) * here);
      pack_across(b.base + block.col + k * b.inner, b.inner, block.cols, here, false, right);
      const A* const* left = nullptr;
      A* packed = nullptr;
      if (a.across()) {
        packed = left_.numbers.take((block.rows + kPackedMore) * here);
        pack_across(a.base + block.row + k * a.inner, a.inner, block.rows, here, true, packed);
      } else {
        left = dense(a, block.row, block.rows, k, here, false, left_);
      }
      across_products(AcrossProducts<A>{
          .a = left,
          .packed = packed,
          .rows = block.rows,
          .b = right,
          .cols = block.cols,
          .d = here,
          .limits = limits,
          .first_row = block.row,
          .acc = acc,
          .ld = block.cols,
          .next = {bytes(a.base + block.row + (k + here) * a.inner),
                   bytes(b.base + block.col + (k + here) * b.inner)},
          .stride = b.inner * static_cast<int64_t>(sizeof(R)),
          .count = a.across() && a.inner == b.inner ? std::min(chunk, d - k - here) : 0});
    }
  }

  static const char* bytes(const void* at) { return static_cast<const char*>(at); }

  // numbers of a block's columns that stay in the second-level cache
  static constexpr int64_t kSpan = 96 * 768;
  // columns that meet more rows than this are copied, even where they could be read in place, when
  // more than four of them share each cache set (1,024 sets of 64 bytes)
  static constexpr int64_t kInPlaceRows = 16, kShared = 4, kSets = 1024 * 64;

  static bool crowded(int64_t row, int64_t count) {
    const int64_t bytes = row * static_cast<int64_t>(sizeof(A));
    const int64_t apart = std::min(bytes & -bytes, kSets);
    return count * apart > kShared * kSets;
  }

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

// f(next) on every thread, where next() is a pointer to the next block or null: blocks take
// different times where limits cut them
template <class F>
void share(const std::vector<Block>& blocks, const F& f) {
  std::atomic<size_t> taken{0};
  const auto next = [&]() -> const Block* {
    const size_t i = taken.fetch_add(1);
    return i < blocks.size() ? &blocks[i] : nullptr;
  };
  const auto threads = std::min<int64_t>(torch::stable::get_num_threads(), blocks.size());
  parallel(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(next);
  });
}

}  // namespace mik
