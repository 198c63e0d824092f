// SPDX-License-Identifier: Apache-2.0
// One block of queries of attention's gradients, a chunk of keys at a time.
#pragma once

#include <cstdint>

namespace mik {

// queries of a block and keys of a chunk: what a product reads again and again, 16 KB of a chunk's
// scores and 16 of its keys (64 numbers), stays in the first-level cache. Sums over keys and over
// queries run over 64 terms in the accumulator type before they are added to others
constexpr int64_t kQueries = 64, kKeys = 64;

// numbers from row to row of an operand with `size` columns: whole cache lines, and for wide ones
// not a power of two, since such rows share few cache sets
constexpr int64_t row_of(int64_t size) {
  const int64_t whole = (size + 15) / 16 * 16;
  return whole > 64 ? whole + 16 : whole;
}

// what is kept for each query of a block
enum Statistic {
  kMost,          // the largest score
  kRawMost,       // the largest |scale q k|
  kSome,          // not 0 if there is a key
  kSum,           // of exp(score - most); its inverse once it is complete
  kTempered,      // the same at the temperature
  kMean,          // sum_j P_j dP_j
  kTemperedMean,  // the same with P'
  kChange,        // squared sum of what the temperature changes in dS
  kPlain,         // squared sum of dS at temperature 1
  kStatistics
};

// a block's operands, dense and in the accumulator type; rows of what belongs to q and k are `qk`
// numbers apart, to v and out `vo`. Scores lie by key: lanes of a vector are queries
template <class A>
struct AttentionBlock {
  int64_t rows, first_row, e, f, qk, vo;
  A scale, softcap, temperature;
  bool causal;
  int64_t window;
  const A *q, *grad;                // [rows, e], [rows, f]
  const A *q_across, *grad_across;  // [e, kQueries], [f, kQueries]
  const A *k, *v;                   // [S, e], [S, f]
  // of the live keys so far, [keys, kQueries]: score, then exp(score - most), then P; dP, then dS;
  // softcap' where there is one; exp at the temperature where it is not 1 or 2
  A *scores, *dp, *slope, *tempered;
  A* statistics;          // [kStatistics, kQueries]
  A *dq, *out, *dk, *dv;  // sums to add to, as q, as grad, as k and v
};

// Where queries come before their keys, chunks are met by strips of as many queries and keys: 5/8
// of a chunk on the diagonal
constexpr int64_t kStrip = 16;

// at most kKeys keys from `key` on, a multiple of kStrip, whose scores begin at row `at` of the
// block's
struct KeyChunk {
  int64_t key, count, at;
};

}  // namespace mik
