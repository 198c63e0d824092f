// SPDX-License-Identifier: Apache-2.0
// Which slots a token owns and which token a slot belongs to: k per token, or as row offsets say.
#pragma once

#include <algorithm>

#include "common.h"
#include "cpu/sae/indices.h"

namespace mik {

struct EqualRows {
  int64_t k;

  int64_t begin(int64_t token) const { return token * k; }
  int64_t end(int64_t token) const { return token * k + k; }
};

// the last token also owns the slots that are not in use
struct RaggedRows {
  const int64_t* offsets;
  int64_t tokens, slots;

  int64_t begin(int64_t token) const { return offsets[token]; }
  int64_t end(int64_t token) const { return token == tokens - 1 ? slots : offsets[token + 1]; }
};

struct EqualTokens {
  int64_t k;

  int64_t operator()(int64_t slot) const { return slot / k; }
};

struct GivenTokens {
  const int64_t* tokens;

  int64_t operator()(int64_t slot) const { return tokens[slot]; }
};

// the most slots that one of tokens begin..end owns
template <class Rows>
int64_t longest_row(const Rows& rows, int64_t begin, int64_t end) {
  int64_t longest = 0;
  for (int64_t n = begin; n < end; ++n) longest = std::max(longest, rows.end(n) - rows.begin(n));
  return longest;
}

// bounds[0..count] ascend from 0; the last is `total`, or at most that
inline void check_bounds(const char* op, const Tensor& bounds, int64_t count, int64_t total,
                         bool whole) {
  const std::string name(op);
  if (bounds.dim() != 1 || bounds.scalar_type() != ScalarType::Long || bounds.size(0) != count + 1)
    throw std::runtime_error(name + ": offsets must be " + std::to_string(count + 1) + " int64");
  const int64_t* at = data<int64_t>(bounds);
  bool ascending = count >= 0 && at[0] == 0 && (whole ? at[count] == total : at[count] <= total);
  for (int64_t i = 0; i < count; ++i) ascending &= at[i] <= at[i + 1];
  if (!ascending)
    throw std::runtime_error(name + ": offsets must ascend from 0 to " + std::to_string(total));
}

// f(begin, end) over ranges of owners of about equal work (their slots plus one), so that long rows
// and hot features do not leave one thread behind; an owner is never split, so sums stay ordered
template <class F>
void parallel_owners(const int64_t* offsets, int64_t owners, const F& f) {
  const int64_t work = offsets[owners] + owners;
  const int64_t pieces = std::min<int64_t>(owners, 64);
  const auto boundary = [&](int64_t piece) {
    const int64_t target = work * piece / pieces;
    int64_t low = 0, high = owners;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (offsets[middle] + middle < target)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  parallel(pieces, 1, [&](int64_t begin, int64_t end) {
    f(begin == 0 ? 0 : boundary(begin), end == pieces ? owners : boundary(end));
  });
}

// f(rows, begin, end) over ranges of n tokens: k slots each, or as checked row offsets say
template <class F>
void parallel_rows(int64_t n, int64_t k, int64_t slots, const OptionalTensor& row_offsets,
                   const F& f) {
  if (!row_offsets.has_value()) {
    parallel(n, 16, [&](int64_t begin, int64_t end) { f(EqualRows{k}, begin, end); });
    return;
  }
  const int64_t* offsets = data<int64_t>(*row_offsets);
  parallel_owners(offsets, n, [&](int64_t begin, int64_t end) {
    f(RaggedRows{offsets, n, slots}, begin, end);
  });
}

// `indices` of a layer's slots: [N, k], or [S] with row offsets; both made contiguous
inline void check_rows(const char* op, Tensor& indices, OptionalTensor& row_offsets) {
  const std::string name(op);
  if (indices.dim() != (row_offsets.has_value() ? 1 : 2))
    throw std::runtime_error(name + ": expected slots [N, k], or [S] with row_offsets [N + 1]");
  indices = torch::stable::contiguous(indices);
  if (!row_offsets.has_value()) return;
  if (row_offsets->dim() != 1 || row_offsets->size(0) < 1)
    throw std::runtime_error(name + ": row_offsets must be [N + 1]");
  row_offsets = torch::stable::contiguous(*row_offsets);
  const int64_t n = row_offsets->size(0) - 1, slots = indices.size(0);
  check_bounds(op, *row_offsets, n, slots, false);
  if (n == 0 && slots != 0)
    throw std::runtime_error(name + ": slots must belong to a token, got no tokens");
}

// tokens of the slots: none for [N, k], else one in 0..N-1 for each of [S]
inline void check_tokens(const char* op, const Tensor& values, OptionalTensor& tokens, int64_t n) {
  const std::string name(op);
  if (values.dim() != (tokens.has_value() ? 1 : 2))
    throw std::runtime_error(name + ": expected slots [N, k], or [S] with their tokens [S]");
  if (!tokens.has_value()) return;
  if (tokens->dim() != 1 || tokens->size(0) != values.size(0))
    throw std::runtime_error(name + ": tokens must be [S], one for each slot");
  tokens = torch::stable::contiguous(*tokens);
  check_indices(op, *tokens, tokens->numel(), n);
}

}  // namespace mik
