// Vectors of LANES floats, and their operations in the kernels.
//
// One source, compiled once for each instruction set: level.cc is built with -DLANES=4, 8 or 16 and the matching
// target flags, and everything here is in a namespace of that level. No standard header with inline functions is
// included: the linker could otherwise pick an AVX-512 copy of std::min for every caller.
#pragma once
#include "kernels.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifndef LANES
#error "compile level.cc with -DLANES=4, 8 or 16"
#endif

#define RIGL_INLINE inline __attribute__((always_inline))

namespace {  // each level keeps its own copies

typedef float vec __attribute__((vector_size(LANES * 4)));
// Loads accept any address of a float: on AVX they are as fast as aligned loads if the address is aligned, as is usual.
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

RIGL_INLINE vec load(const float* p) { return *(const loose*)p; }
RIGL_INLINE void store(float* p, vec v) { *(loose*)p = v; }
RIGL_INLINE vec zero() { return vec{}; }
RIGL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

RIGL_INLINE vec splat(float s) {
#if LANES == 4
  return vec{s, s, s, s};
#elif LANES == 8
  return vec{s, s, s, s, s, s, s, s};
#else
  return vec{s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s};
#endif
}

// Pairs of bfloat16s, one in each lane.
typedef uint16_t words __attribute__((vector_size(LANES * 4)));
typedef uint32_t lanes32 __attribute__((vector_size(LANES * 4)));

// Numbers in a vector of T: floats, or bfloat16s.
template <class T>
constexpr int64_t STEP = sizeof(vec) / sizeof(T);

RIGL_INLINE words load(const uint16_t* p) {
  words w;
  __builtin_memcpy(&w, p, sizeof w);
  return w;
}

// sums + a * b in each lane; of pairs, + the product of the first numbers + that of the second ones.
RIGL_INLINE vec multiply_add(vec sums, vec a, vec b) { return sums + a * b; }
RIGL_INLINE vec multiply_add(vec sums, words a, words b) {
#ifdef __AVX512BF16__
  return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
  const lanes32 x = (lanes32)a, y = (lanes32)b;
  sums += (vec)(x & 0xffff0000) * (vec)(y & 0xffff0000);
  return sums + (vec)(x << 16) * (vec)(y << 16);
#endif
}

// Small square transposes and sums use vectors of 8 (or 4) at every level: with AVX-512 a 16x16 transpose is not faster
// than 8x8 ones, and one path is easier to test.
#if LANES == 4
#define SQUARE 4
typedef vec square_vec;
#else
#define SQUARE 8
typedef float square_vec __attribute__((vector_size(32)));
#endif
typedef float quad __attribute__((vector_size(16)));
typedef float square_loose __attribute__((vector_size(SQUARE * 4), aligned(4), may_alias));

RIGL_INLINE square_vec square_load(const float* p) { return *(const square_loose*)p; }
RIGL_INLINE void square_store(float* p, square_vec v) { *(square_loose*)p = v; }

// A bfloat16 is the upper half of a float. Activations and values in memory may be bfloat16s; all sums are of floats.
typedef uint16_t square_halves __attribute__((vector_size(SQUARE * 2)));
typedef uint16_t square_words __attribute__((vector_size(SQUARE * 4)));
typedef uint32_t square_bits __attribute__((vector_size(SQUARE * 4)));

RIGL_INLINE square_vec square_load(const Half* p) {
  square_halves h;
  __builtin_memcpy(&h, p, sizeof h);
  return (square_vec)(__builtin_convertvector(h, square_bits) << 16);
}

// The nearest bfloat16 in the upper half of each lane, of two equally near ones the even one; NaN stays NaN.
RIGL_INLINE square_bits rounded(square_vec v) {
  const square_bits bits = (square_bits)v, up = bits + 0x7fff + (bits >> 16 & 1);
  return (bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : up;
}

// The nearest bfloat16s of two numbers in each lane, that of `low` in its lower half.
RIGL_INLINE square_vec rounded_pairs(square_vec low, square_vec high) {
#ifdef __AVX512BF16__
  const square_words both = (square_words)_mm256_cvtne2ps_pbh((__m256)high, (__m256)low);
  return (square_vec)__builtin_shufflevector(both, both, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return (square_vec)(rounded(low) >> 16 | (rounded(high) & 0xffff0000));
#endif
}

RIGL_INLINE void square_store(Half* p, square_vec v) {
  const square_halves h = __builtin_convertvector(rounded(v) >> 16, square_halves);
  __builtin_memcpy(p, &h, sizeof h);
}

RIGL_INLINE float number(float x) { return x; }
RIGL_INLINE float number(Half x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// The numbers of a V, which are floats, from memory.
template <class V>
RIGL_INLINE V floats_at(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
RIGL_INLINE V floats_at(const Half* p) {
#ifdef __SSE2__  // compilers vectorize what is below only from SSE4.1 on
  if constexpr (sizeof(V) == sizeof(quad)) {
    typedef uint16_t Eight __attribute__((vector_size(16)));
    typedef uint64_t Two __attribute__((vector_size(16)));
    uint64_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return (V)__builtin_shufflevector(Eight{}, (Eight)Two{four}, 0, 8, 1, 9, 2, 10, 3, 11);
  }
#endif
  decltype(V{} == V{}) bits;  // integers of the same size
#pragma GCC unroll 16
  for (uint64_t i = 0; i < sizeof(V) / 4; i++) bits[i] = p[i].bits;
  return (V)(bits << 16);
}

RIGL_INLINE void put(float* p, float x) { *p = x; }
RIGL_INLINE void put(Half* p, float x) {
  square_vec v = {x};
  Half all[SQUARE];
  square_store(all, v);
  *p = all[0];
}

#if SQUARE == 8
RIGL_INLINE void transpose(square_vec r[8]) {
  square_vec t[8], s[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[2 * i + 1] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int h = 0; h < 8; h += 4)
    for (int i = 0; i < 2; i++) {
      s[h + 2 * i] = __builtin_shufflevector(t[h + i], t[h + 2 + i], 0, 1, 8, 9, 4, 5, 12, 13);
      s[h + 2 * i + 1] = __builtin_shufflevector(t[h + i], t[h + 2 + i], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; i++) {
    r[i] = __builtin_shufflevector(s[i], s[4 + i], 0, 1, 2, 3, 8, 9, 10, 11);
    r[4 + i] = __builtin_shufflevector(s[i], s[4 + i], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Lane i of the result is the sum over the lanes of r[i].
RIGL_INLINE square_vec sums(const square_vec r[8]) {
  square_vec t[4], s[2];
  for (int i = 0; i < 4; i++)
    t[i] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
           __builtin_shufflevector(r[2 * i], r[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  for (int i = 0; i < 2; i++)
    s[i] = __builtin_shufflevector(t[2 * i], t[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(t[2 * i], t[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(s[0], s[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(s[0], s[1], 4, 5, 6, 7, 12, 13, 14, 15);
}
#else
RIGL_INLINE void transpose(square_vec r[4]) {
  square_vec t[4];
  for (int i = 0; i < 2; i++) {
    t[i] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 0, 4, 1, 5);
    t[2 + i] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 2, 6, 3, 7);
  }
  r[0] = __builtin_shufflevector(t[0], t[1], 0, 1, 4, 5);
  r[1] = __builtin_shufflevector(t[0], t[1], 2, 3, 6, 7);
  r[2] = __builtin_shufflevector(t[2], t[3], 0, 1, 4, 5);
  r[3] = __builtin_shufflevector(t[2], t[3], 2, 3, 6, 7);
}

RIGL_INLINE square_vec sums(const square_vec r[4]) {
  square_vec t[4] = {r[0], r[1], r[2], r[3]};
  transpose(t);
  return (t[0] + t[1]) + (t[2] + t[3]);
}
#endif

// Adds the lanes of one vector to SQUARE lanes, for `sums`.
RIGL_INLINE square_vec fold(vec v) {
#if LANES == 16
  return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
         __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  return v;
#endif
}

}  // namespace
