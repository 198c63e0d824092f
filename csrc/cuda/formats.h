// SPDX-License-Identifier: Apache-2.0
// Element formats: how scores rank, and how many of them one 32-bit maximum compares.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace mik::cuda {

template <class To, class From>
__device__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// an integer that sorts as the value does: NaN first, -0 == +0; no value has the key 0
template <class Format>
__device__ uint32_t rank_key(uint32_t bits) {
  constexpr uint32_t sign = 1u << (8 * sizeof(typename Format::Bits) - 1);
  constexpr uint32_t all = sign | (sign - 1);
  const uint32_t magnitude = bits & (sign - 1);
  if (magnitude > Format::infinity) return all;
  if (magnitude == 0) return sign;
  return bits & sign ? all & ~bits : bits | sign;
}

// `larger` is the maximum of each element of a word, NaN if one of them is
struct Bf16 {
  using Bits = uint16_t;
  static constexpr uint32_t infinity = 0x7f80;
  static constexpr uint32_t lowest = 0xff80;
  static __device__ uint32_t larger(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hmax2_nan(bits_as<__nv_bfloat162>(a), bits_as<__nv_bfloat162>(b)));
  }
};

struct Fp16 {
  using Bits = uint16_t;
  static constexpr uint32_t infinity = 0x7c00;
  static constexpr uint32_t lowest = 0xfc00;
  static __device__ uint32_t larger(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hmax2_nan(bits_as<__half2>(a), bits_as<__half2>(b)));
  }
};

struct Fp32 {
  using Bits = uint32_t;
  static constexpr uint32_t infinity = 0x7f800000;
  static constexpr uint32_t lowest = 0xff800000;
  static __device__ uint32_t larger(uint32_t a, uint32_t b) {
    const float x = bits_as<float>(a), y = bits_as<float>(b);
    return x > y || x != x ? a : b;
  }
};

// elements in 16 bytes
template <class Format>
constexpr uint32_t width = 16 / sizeof(typename Format::Bits);

// bits of element j of 16 bytes
template <class Format>
__device__ uint32_t element(const uint32_t (&words)[4], uint32_t j) {
  if constexpr (sizeof(typename Format::Bits) == 4) return words[j];
  return words[j / 2] >> (j % 2 * 16) & 0xffff;
}

// bits of the larger element of a word
template <class Format>
__device__ uint32_t folded(uint32_t word) {
  if constexpr (sizeof(typename Format::Bits) == 4) return word;
  return Format::larger(word, word >> 16) & 0xffff;
}

}  // namespace mik::cuda
