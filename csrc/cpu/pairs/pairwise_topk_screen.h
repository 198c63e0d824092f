// SPDX-License-Identifier: Apache-2.0
// Pairs found by 8-bit and 16-bit products: quantises rows of both sides in panels and deals out
// the tiles.
#pragma once

#include "cpu/pairs/pairwise_topk_select.h"
#include "cpu/screen/columns.h"

#define MIK_BODY "cpu/pairs/pairwise_topk_body.h"
#include "cpu/simd/each_screen_level.h"

namespace mik {

// longer rows leave too few bits per number: at 2^14 the bound is 0.15 standard deviations of the
// scores
constexpr int64_t kScreened = 1 << 14;
// fewer rows on either side do not pay for bytes
constexpr int64_t kCoarseRows = 256;

template <class T>
class ScreenedPairs {
 public:
  ScreenedPairs(const LongRows<T>& a, const LongRows<T>& b, const PairRule& rule)
      : a_(a),
        b_(b),
        rule_(rule),
        padded_(std::max(round_up(a.length(), kDimPadding), kDimPadding)),
        coarse_(std::min(rule.n, rule.m) >= kCoarseRows && has_coarse_screen(padded_)),
        bound_(rule.min_value) {}

  std::vector<Pair<float>> run() {
    if (coarse_) columns_ = balanced(mean_squares(a_), mean_squares(b_));
    const int64_t threads = torch::stable::get_num_threads();
    workers_.clear();
    for (int64_t t = 0; t < threads; ++t) workers_.push_back(std::make_unique<Worker>(*this));
    const int64_t chunk = rows_of(kRowBytes, kTokenPadding, rule_.n);
    const int64_t panel = rows_of(kColBytes, kRowPadding, rule_.m);
    Side rows(chunk, padded_, coarse_), cols(panel, padded_, coarse_);
    for (int64_t i = 0; i < rule_.n; i += chunk) {
      quantise_rows(a_, rule_.rows(), i, std::min(chunk, rule_.n - i), true, rows);
      const int64_t lowest = *std::min_element(rows.lowest.begin(), rows.lowest.end());
      for (int64_t j = 0; j < rule_.m; j += panel) {
        const int64_t count = std::min(panel, rule_.m - j);
        const int64_t* rank = rule_.cols();
        if (rank != nullptr && *std::max_element(rank + j, rank + j + count) <= lowest) continue;
        quantise_rows(b_, rank, j, count, false, cols);
        screen(rows, cols);
      }
    }
    std::vector<Pair<float>> all;
    for (auto& worker : workers_)
      all.insert(all.end(), worker->pairs.begin(), worker->pairs.begin() + worker->list.size);
    workers_.clear();
    return strongest<T>(std::move(all), rule_, a_, b_, bound_);
  }

 private:
  // panels of either side. The columns are quantised again for each chunk of rows, which is
  // why rows get more
  static constexpr int64_t kRowBytes = 32 << 20, kColBytes = 8 << 20;

  struct Side {
    Side(int64_t slots, int64_t padded, bool coarse)
        : numbers(new uint16_t[slots * padded]),
          scale(slots),
          p(slots),
          q(slots),
          lowest(slots / kTileTokens) {
      if (!coarse) return;
      bytes.reset(new uint8_t[slots * padded]);
      rows.reset(new uint16_t[slots * padded]);
      start.resize(slots);
      for (auto* terms : {&byte_scale, &byte_p, &byte_q}) terms->resize(slots);
    }

    std::unique_ptr<uint16_t[]> numbers, rows;
    std::unique_ptr<uint8_t[]> bytes;
    std::vector<int32_t> start;
    std::vector<float> scale, p, q, byte_scale, byte_p, byte_q;
    std::vector<int64_t> lowest;
    ScreenSide view{};
  };

  struct Worker {
    explicit Worker(ScreenedPairs& owner)
        : all(owner),
          exact(owner.a_, owner.b_, owner.rule_.by_abs),
          pairs(pairs_capacity(owner.rule_)),
          course(owner.padded_) {
      list = {.pairs = pairs.data(),
              .size = 0,
              .capacity = static_cast<int64_t>(pairs.size()),
              .tau = owner.bound_.get(),
              .by_abs = owner.rule_.by_abs,
              .mirrored = owner.rule_.mirrored,
              .course = owner.coarse_ ? &course : nullptr,
              .context = this,
              .make_room = &Worker::make_room};
    }

    static void make_room(PairList& list) {
      auto& self = *static_cast<Worker*>(list.context);
      list.size = thin_out<T>(list.pairs, list.size, list.capacity, self.all.rule_.k,
                              self.all.bound_, &list.tau, self.exact, self.scratch);
    }

    ScreenedPairs& all;
    ExactPairs<T> exact;
    std::vector<Pair<float>> pairs;
    std::vector<float> scratch;
    CoarseCourse course;
    PairList list;
  };

  const LongRows<T>&a_, &b_;
  const PairRule& rule_;
  const int64_t padded_;
  const bool coarse_;
  Columns columns_;
  SharedBound<float> bound_;
  std::vector<std::unique_ptr<Worker>> workers_;

  int64_t rows_of(int64_t bytes, int64_t step, int64_t most) const {
    // 16-bit numbers in tiles; in rows and as bytes too for the coarse screen
    const int64_t row = (coarse_ ? 5 : 2) * padded_;
    const int64_t fitting = std::max(bytes / row / step * step, step);
    return std::min(fitting, round_up(most, step));
  }

  // of the columns, in a sample of rows
  static std::vector<double> mean_squares(const LongRows<T>& of) {
    std::vector<double> squares(of.length());
    std::vector<float> row(of.length());
    const int64_t sampled = std::min(of.count(), kSampledRows);
    for (int64_t i = 0; i < sampled; ++i) {
      of.copy(i * (of.count() / sampled), row.data());
      for (int64_t j = 0; j < of.length(); ++j)
        squares[j] += static_cast<double>(row[j]) * row[j] / static_cast<double>(sampled);
    }
    return squares;
  }

  // scale, p and q of a row of either side, rounded to 16 bits or to 8
  struct Terms {
    float scale, p, q;
  };

  Terms terms_of(const QuantisedRow& of, double factor, bool tiled) const {
    const double size = std::fabs(factor), norm = size * of.norm;
    const bool zero = of.error == 0 && norm == 0;
    // the scaled norm has to stay within fp32 too
    const bool safe = zero || (norm >= kSmallestNorm && norm <= kLargestNorm &&
                               size <= kLargestNorm && size >= kSmallestNorm);
    const double error = size * of.error * kUp, whole = (norm + error) * kUp;
    const float scale = static_cast<float>(of.scale * factor);
    if (tiled)
      return {scale, safe ? static_cast<float>(error) : kInfinity, static_cast<float>(whole)};
    const double share = (error + whole * (kEvaluation + screen_rounding(padded_))) * kUp;
    return {scale, static_cast<float>(norm * kUp), safe ? static_cast<float>(share) : kInfinity};
  }

  // row i of a side, of `count`; slots behind them are multiplied too, and form no pair
  void quantise_row(const LongRows<T>& of, int64_t first, int64_t i, int64_t count, bool tiled,
                    Side& side, float* row, float* scratch, uint16_t* own,
                    int8_t* own_bytes) const {
    // tiles are filled from this thread's copy, or from the rows that the coarse screen keeps
    uint16_t* to = !tiled    ? side.numbers.get() + i * padded_
                   : coarse_ ? side.rows.get() + i * padded_
                             : own;
    int8_t* bytes = tiled
                        ? own_bytes
                        : reinterpret_cast<int8_t*>(side.bytes.get()) + (coarse_ ? i * padded_ : 0);
    Terms fine{}, coarse{};
    int32_t sum = 0;
    if (i >= count) {
      std::fill_n(to, padded_, uint16_t(0));
      if (coarse_) std::fill_n(bytes, padded_, int8_t(0));
    } else {
      of.copy(first + i, row);
      const double factor = of.scale(first + i);
      if (coarse_) {
        const TwiceQuantised both = quantise_twice(row, (tiled ? columns_.x : columns_.w).data(),
                                                   of.length(), padded_, scratch, bytes, to);
        fine = terms_of(both.fine, factor, tiled);
        coarse = terms_of(both.coarse, factor, tiled);
        sum = both.sum;
      } else {
        fine = terms_of(quantise(row, of.length(), to, padded_), factor, tiled);
      }
    }
    side.scale[i] = fine.scale;
    side.p[i] = fine.p;
    side.q[i] = fine.q;
    if (tiled) into_tile(to, padded_, i, side.numbers.get());
    if (!coarse_) return;
    side.byte_scale[i] = coarse.scale;
    side.byte_p[i] = coarse.p;
    side.byte_q[i] = coarse.q;
    // rows are stored 128 too large
    side.start[i] = -128 * sum;
    if (tiled) into_byte_tile(bytes, padded_, i, side.bytes.get());
  }

  // rows first..first + count, in tiles or dense, and the terms of the bound
  void quantise_rows(const LongRows<T>& of, const int64_t* rank, int64_t first, int64_t count,
                     bool tiled, Side& side) const {
    const int64_t slots = static_cast<int64_t>(side.scale.size());
    parallel(round_up(count, tiled ? kTokenPadding : kRowPadding) / kTileTokens, 2,
             [&](int64_t begin, int64_t end) {
               std::vector<float> row(padded_), scratch(padded_);
               std::vector<uint16_t> own(padded_);
               std::vector<int8_t> own_bytes(padded_);
               for (int64_t i = begin * kTileTokens; i < std::min(slots, end * kTileTokens); ++i)
                 quantise_row(of, first, i, count, tiled, side, row.data(), scratch.data(),
                              own.data(), own_bytes.data());
               for (int64_t t = begin; tiled && t < end; ++t) {
                 int64_t low = INT64_MAX;
                 for (int64_t i = t * kTileTokens; i < std::min(count, (t + 1) * kTileTokens); ++i)
                   low = std::min(low, rank == nullptr ? INT64_MIN : rank[first + i]);
                 side.lowest[t] = low;
               }
             });
    for (size_t t = tiled ? round_up(count, kTokenPadding) / kTileTokens : 0;
         t < side.lowest.size(); ++t)
      side.lowest[t] = INT64_MAX;
    side.view = {.numbers = side.numbers.get(),
                 .padded = padded_,
                 .first = first,
                 .count = count,
                 .scale = side.scale.data(),
                 .p = side.p.data(),
                 .q = side.q.data(),
                 .rank = rank == nullptr ? nullptr : rank + first,
                 .bytes = side.bytes.get(),
                 .start = side.start.data(),
                 .byte_scale = side.byte_scale.data(),
                 .byte_p = side.byte_p.data(),
                 .byte_q = side.byte_q.data(),
                 .rows = side.rows.get()};
  }

  void screen(const Side& rows, const Side& cols) {
    const int64_t tiles = round_up(rows.view.count, kTokenPadding) / kTileTokens;
    // smaller shares than the cache holds, so that threads end together
    const int64_t share = std::max<int64_t>(
        std::min(tiles_in_cache(padded_), round_up(tiles / (4 * workers_.size()), 2)), 2);
    std::atomic<int64_t> next{0};
    parallel(static_cast<int64_t>(workers_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) {
        PairList& list = workers_[w]->list;
        for (int64_t tile; (tile = next.fetch_add(share)) < tiles;) {
          list.tau = std::max(list.tau, bound_.get());
          MIK_SCREEN(screen_pairs)(rows.view, rows.lowest.data(), tile,
                                   std::min(tile + share, tiles), cols.view, list);
        }
      }
    });
  }
};

}  // namespace mik
