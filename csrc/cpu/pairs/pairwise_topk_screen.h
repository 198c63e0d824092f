// SPDX-License-Identifier: Apache-2.0
// Pairs found by 16-bit products: quantises rows of both sides in panels and deals out the tiles.
#pragma once

#include "cpu/pairs/pairwise_topk_select.h"

#define MIK_BODY "cpu/pairs/pairwise_topk_body.h"
#include "cpu/simd/each_screen_level.h"

namespace mik {

// longer rows leave too few bits per number: at 2^14 the bound is 0.15 standard deviations of the
// scores
constexpr int64_t kScreened = 1 << 14;

template <class T>
class ScreenedPairs {
 public:
  ScreenedPairs(const LongRows<T>& a, const LongRows<T>& b, const PairRule& rule)
      : a_(a),
        b_(b),
        rule_(rule),
        padded_(std::max(round_up(a.length(), kDimPadding), kDimPadding)),
        bound_(rule.min_value) {}

  std::vector<Pair<float>> run() {
    const int64_t threads = torch::stable::get_num_threads();
    workers_.clear();
    for (int64_t t = 0; t < threads; ++t) workers_.push_back(std::make_unique<Worker>(*this));
    const int64_t chunk = rows_of(kRowBytes, kTokenPadding, rule_.n);
    const int64_t panel = rows_of(kColBytes, kRowPadding, rule_.m);
    Side rows(chunk, padded_), cols(panel, padded_);
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
  // 16-bit panels of either side. The columns are quantised again for each chunk of rows, which is
  // why rows get more
  static constexpr int64_t kRowBytes = 32 << 20, kColBytes = 8 << 20;

  struct Side {
    Side(int64_t slots, int64_t padded)
        : numbers(new uint16_t[slots * padded]),
          scale(slots),
          p(slots),
          q(slots),
          lowest(slots / kTileTokens) {}

    std::unique_ptr<uint16_t[]> numbers;
    std::vector<float> scale, p, q;
    std::vector<int64_t> lowest;
    ScreenSide view{};
  };

  struct Worker {
    explicit Worker(ScreenedPairs& owner)
        : all(owner),
          exact(owner.a_, owner.b_, owner.rule_.by_abs),
          pairs(pairs_capacity(owner.rule_)) {
      list = {pairs.data(),
              0,
              static_cast<int64_t>(pairs.size()),
              owner.bound_.get(),
              owner.rule_.by_abs,
              owner.rule_.mirrored,
              this,
              &Worker::make_room};
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
    PairList list;
  };

  const LongRows<T>&a_, &b_;
  const PairRule& rule_;
  const int64_t padded_;
  SharedBound<float> bound_;
  std::vector<std::unique_ptr<Worker>> workers_;

  int64_t rows_of(int64_t bytes, int64_t step, int64_t most) const {
    const int64_t fitting = std::max(bytes / (2 * padded_) / step * step, step);
    return std::min(fitting, round_up(most, step));
  }

  // rows first..first + count, in tiles or dense, and the terms of the bound
  void quantise_rows(const LongRows<T>& of, const int64_t* rank, int64_t first, int64_t count,
                     bool tiled, Side& side) const {
    const int64_t slots = static_cast<int64_t>(side.scale.size());
    const double accumulation = screen_rounding(padded_);
    parallel(round_up(count, tiled ? kTokenPadding : kRowPadding) / kTileTokens, 2,
             [&](int64_t begin, int64_t end) {
               std::vector<float> row(padded_);
               std::vector<uint16_t> own(padded_);
               for (int64_t i = begin * kTileTokens; i < std::min(slots, end * kTileTokens); ++i) {
                 uint16_t* to = tiled ? own.data() : side.numbers.get() + i * padded_;
                 side.scale[i] = side.p[i] = side.q[i] = 0;
                 if (i >= count) {
                   std::fill_n(to, padded_, uint16_t(0));
                 } else {
                   of.copy(first + i, row.data());
                   const QuantisedRow found = quantise(row.data(), of.length(), to, padded_);
                   const double factor = of.scale(first + i), size = std::fabs(factor);
                   const double norm = size * found.norm;
                   const bool zero = found.error == 0 && norm == 0;
                   // the scaled norm has to stay within fp32 too
                   const bool safe = zero || (norm >= kSmallestNorm && norm <= kLargestNorm &&
                                              size <= kLargestNorm && size >= kSmallestNorm);
                   const double error = size * found.error * kUp, whole = (norm + error) * kUp;
                   side.scale[i] = static_cast<float>(found.scale * factor);
                   if (tiled) {
                     side.p[i] = safe ? static_cast<float>(error) : kInfinity;
                     side.q[i] = static_cast<float>(whole);
                   } else {
                     side.p[i] = static_cast<float>(norm * kUp);
                     side.q[i] = safe ? static_cast<float>(
                                            (error + whole * (kEvaluation + accumulation)) * kUp)
                                      : kInfinity;
                   }
                 }
                 if (tiled) into_tile(to, padded_, i, side.numbers.get());
               }
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
    side.view = {
        side.numbers.get(), padded_,       first,         count,
        side.scale.data(),  side.p.data(), side.q.data(), rank == nullptr ? nullptr : rank + first};
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
