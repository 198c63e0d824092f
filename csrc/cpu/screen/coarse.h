// SPDX-License-Identifier: Apache-2.0
// When a block of tokens is screened in 8 bits first.
#pragma once

#include <cstdint>

namespace mik {

// Costs are in units of one pair's product in 16 bits. A pair costs half a unit in 8 bits, and more
// where it passes: a dot product of its own. So 8 bits pay while few pass, which is never so at the
// start, when nothing is known of the best scores, and not at all for some inputs
class CoarseCourse {
 public:
  // some 25 ns with its upkeep beside 2.9 ns a pair at 768 numbers (Zen 5), 51 and 92 beside 6.6
  // and 20 at 768 and 2304 (Zen 4)
  explicit CoarseCourse(int64_t padded) : again_(4.5 + 2400. / static_cast<double>(padded)) {}

  bool is_coarse() const { return coarse_; }

  // `pairs` were screened, of which `passed` passed their first screen
  void note(int64_t rows, int64_t pairs, int64_t passed) {
    rows_ += rows;
    pairs_ += pairs;
    passed_ += passed;
    const double all = static_cast<double>(pairs_), through = static_cast<double>(passed_);
    if (coarse_) {
      const double cost = 0.5 * all + again_ * through;
      // a window that loses is left at once where it loses much
      if (cost > 3 * all || (rows_ >= kWindow && cost > all)) return turn(false);
      if (rows_ >= kWindow) restart();
    } else if (rows_ >= kWindow) {
      waited_ += rows_;
      if (through < kFew * all && waited_ >= wait_) return turn(true);
      restart();
    }
  }

 private:
  // rows of a decision; the share that passes in 16 bits, of which more pass in 8, that allows a
  // try
  static constexpr int64_t kWindow = 48;
  static constexpr double kFew = 0.04;

  double again_;
  bool coarse_ = false;
  int64_t rows_ = 0, pairs_ = 0, passed_ = 0, waited_ = 0, wait_ = 0;

  void restart() { rows_ = pairs_ = passed_ = 0; }

  // each failed try doubles the wait for the next, so that there are few (an outlier in every row:
  // 3 % slower than 16 bits alone, Zen 5)
  void turn(bool coarse) {
    coarse_ = coarse;
    if (!coarse) wait_ = wait_ == 0 ? 512 : 2 * wait_;
    waited_ = 0;
    restart();
  }
};

}  // namespace mik
