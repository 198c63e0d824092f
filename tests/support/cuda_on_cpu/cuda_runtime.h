// SPDX-License-Identifier: Apache-2.0
// Enough of CUDA to run kernels on the CPU, for tests. Each thread of a block is a fiber that runs
// until a barrier or a warp collective. Which of those ready goes on is up to Order: a barrier that
// is missing shows as a wrong result under some order. Shared memory is poisoned before each block
// and guarded behind its end. What this cannot show: races between two barriers, memory ordering,
// divergence inside a warp, speed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define __device__
#define __global__
#define __shared__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  uint32_t x, y, z;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

extern uint3 threadIdx, blockIdx, blockDim, gridDim;

using std::min;

namespace emulator {

// 0: the thread that waits longest; 1: the last to be released; others: random, seeded with it
using Order = uint64_t;

constexpr size_t SHARED_BYTES = 48 << 10;

// runs `kernel` for each block of a 1-D grid; "" or what went wrong
std::string launch(uint32_t blocks, uint32_t threads, void* shared, size_t shared_bytes,
                   Order order, const std::function<void()>& kernel);

void block_barrier();
// all lanes of the warp give a value of at most 8 bytes and see those of all
const uint64_t* collective(const char* name, uint32_t mask, uint64_t value);
uint32_t lane();

template <class T>
T shuffle(const char* name, uint32_t mask, T value, uint32_t source) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  const uint64_t* all = collective(name, mask, word);
  if (source < 32) std::memcpy(&value, &all[source], sizeof(T));
  return value;
}

}  // namespace emulator

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp(uint32_t mask = ~0u) { emulator::collective("__syncwarp", mask, 0); }

template <class T>
T __shfl_sync(uint32_t mask, T value, uint32_t source) {
  return emulator::shuffle("__shfl_sync", mask, value, source % 32);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, uint32_t bits) {
  return emulator::shuffle("__shfl_xor_sync", mask, value, emulator::lane() ^ bits);
}
// a source outside the warp (below 0 wraps to a large number) leaves the value as it is
template <class T>
T __shfl_up_sync(uint32_t mask, T value, uint32_t delta) {
  return emulator::shuffle("__shfl_up_sync", mask, value, emulator::lane() - delta);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, uint32_t delta) {
  return emulator::shuffle("__shfl_down_sync", mask, value, emulator::lane() + delta);
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
  const uint64_t* all = emulator::collective("__ballot_sync", mask, predicate);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(all[i]) << i;
  return bits;
}
template <class T>
uint32_t __match_any_sync(uint32_t mask, T value) {
  const uint64_t* all = emulator::collective("__match_any_sync", mask, value);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(all[i] == value) << i;
  return bits;
}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(bits); }

template <class T>
T atomicAdd(T* place, T value) {
  const T before = *place;
  *place += value;
  return before;
}

template <class T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(T) != 0) __builtin_trap();
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}
template <class T>
T __ldcs(const T* from) {
  return __ldg(from);
}
