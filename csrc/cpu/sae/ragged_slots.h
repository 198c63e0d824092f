// SPDX-License-Identifier: Apache-2.0
// Slots of tokens that have any number of them, as threads find them, and then in order.
#pragma once

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "common.h"

namespace mik {

// Found in passes one after another. A token belongs to one part of a pass, which one thread makes;
// its slots are in order within the part, and those of a pass come before those of the next: so the
// order hangs neither on the number of threads nor on which is first. 8 bytes a slot.
template <class S>
class RaggedSlots {
 public:
  struct Run {
    int32_t token, count;
  };
  struct Slot {
    S value;
    int32_t feature;
  };
  struct Block {
    std::vector<Run> runs;
    std::vector<Slot> slots;
  };
  using Part = std::vector<Block>;

  explicit RaggedSlots(int64_t tokens) : tokens_(tokens), passes_(1) {}

  void add(Part&& part) {
    const std::lock_guard<std::mutex> lock(mutex_);
    passes_.back().push_back(std::move(part));
  }

  void next_pass() { passes_.emplace_back(); }

  // fills row_offsets[0..tokens]; returns the number of slots
  int64_t count(int64_t* row_offsets) const {
    std::fill(row_offsets, row_offsets + tokens_ + 1, 0);
    for (const auto& pass : passes_)
      for (const Part& part : pass)
        for (const Block& block : part)
          for (const Run& run : block.runs) row_offsets[run.token + 1] += run.count;
    for (int64_t n = 0; n < tokens_; ++n) row_offsets[n + 1] += row_offsets[n];
    return row_offsets[tokens_];
  }

  void write(const int64_t* row_offsets, S* values, int64_t* indices) const {
    std::vector<int64_t> next(row_offsets, row_offsets + tokens_);
    for (const auto& pass : passes_)
      parallel(static_cast<int64_t>(pass.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p)
          for (const Block& block : pass[p]) write(block, next.data(), values, indices);
      });
  }

 private:
  const int64_t tokens_;
  std::vector<std::vector<Part>> passes_;
  std::mutex mutex_;

  static void write(const Block& block, int64_t* next, S* values, int64_t* indices) {
    const Slot* slot = block.slots.data();
    for (const Run& run : block.runs) {
      int64_t& to = next[run.token];
      for (const Slot* end = slot + run.count; slot < end; ++slot, ++to) {
        values[to] = slot->value;
        indices[to] = slot->feature;
      }
    }
  }
};

}  // namespace mik
