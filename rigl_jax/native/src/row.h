// y = x W for one batch row, without tiles. T is the type of the values.
#pragma once
#include "kernels.h"
#include "segment.h"
#if LANES == 16 && defined(__AVX512F__)
#define GATHERS
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace {

// Runs of N vectors V: four chains of additions side by side.
template <class V, int N, class T>
__attribute__((noinline)) void gather_row_runs(const Pattern& p, const float* x, const T* values, float* y, int64_t u0,
                                               int64_t u1) {
  constexpr int CHAINS = N == 1 ? 4 : 2, LENGTH = sizeof(V) / 4, RUN = N * LENGTH;
  for (int64_t u = u0; u < u1; u++) {
    V a[CHAINS][N] = {};
    for (int64_t first = 0, s = u; first < p.rows; first += p.block, s += p.units) {
      const T* v = values + (int64_t)p.starts[s] * RUN;
      const uint16_t* k = p.indices + p.starts[s];
      const uint16_t* const end = p.indices + p.starts[s + 1];
      for (; k + CHAINS <= end; k += CHAINS, v += CHAINS * RUN)
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++)
#pragma GCC unroll 4
          for (int i = 0; i < N; i++) a[c][i] += floats_at<V>(v + (c * N + i) * LENGTH) * x[first + k[c]];
      for (; k < end; k++, v += RUN)
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) a[0][i] += floats_at<V>(v + i * LENGTH) * x[first + *k];
    }
#pragma GCC unroll 4
    for (int c = 1; c < CHAINS; c++)
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) a[0][i] += a[c][i];
    __builtin_memcpy(y + u * RUN, a[0], sizeof a[0]);
  }
}

// Two chains of four sums: vectors put together from single loads take fewer instructions than scalar products. One load
// reads four indices, because loads limit this loop.
template <class T>
__attribute__((noinline)) void gather_row(const Pattern& p, const float* x, const T* values, float* y, int64_t u0,
                                          int64_t u1) {
  for (int64_t u = u0; u < u1; u++) {
    quad a = {}, b = {};
    float rest = 0;
    for (int64_t first = 0, s = u; first < p.rows; first += p.block, s += p.units) {
      const T* v = values + p.starts[s];
      const uint16_t* k = p.indices + p.starts[s];
      const float* xb = x + first;
      int64_t n = p.starts[s + 1] - p.starts[s];
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
      const auto four = [=](const uint16_t* k) __attribute__((always_inline)) {
        const uint64_t at = numbers_at<uint64_t>(k);
        return quad{xb[at & 0xffff], xb[at >> 16 & 0xffff], xb[at >> 32 & 0xffff], xb[at >> 48]};
      };
      for (; n >= 8; n -= 8, v += 8, k += 8) {
        a += floats_at<quad>(v) * four(k);
        b += floats_at<quad>(v + 4) * four(k + 4);
      }
      for (; n >= 4; n -= 4, v += 4, k += 4) a += floats_at<quad>(v) * four(k);
#endif
      for (; n > 0; n--, v++, k++) rest += number(v[0]) * xb[k[0]];
    }
    a += b;
    y[u] = (a[0] + a[1]) + (a[2] + a[3]) + rest;
  }
}

#ifdef GATHERS
RIGL_INLINE __m512 some_of(__mmask16 some, const float* p) { return _mm512_maskz_loadu_ps(some, p); }
RIGL_INLINE __m512 some_of(__mmask16 some, const Half* p) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p)), 16);
}

// The same with the gather instruction, 16 entries at a time; the rest of a segment is masked, so short ones need no
// loop of their own. The lanes of eight units are summed together.
template <class T>
__attribute__((noinline)) void gather_row_by_instruction(const Pattern& p, const float* x, const T* values, float* y,
                                                         int64_t u0, int64_t u1) {
  for (int64_t u = u0; u < u1; u += SQUARE) {
    const int64_t units = least(SQUARE, u1 - u);
    square_vec folded[SQUARE] = {};
    for (int64_t j = 0; j < units; j++) {
      __m512 a = _mm512_setzero_ps();
      for (int64_t first = 0, s = u + j; first < p.rows; first += p.block, s += p.units)
        for (int64_t i = p.starts[s]; i < p.starts[s + 1]; i += 16) {
          const __mmask16 some = (__mmask16)((1u << least(16, p.starts[s + 1] - i)) - 1);
          const __m512i at = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p.indices + i));
          const __m512 xs = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, at, x + first, 4);
          a = _mm512_fmadd_ps(some_of(some, values + i), xs, a);
        }
      folded[j] = fold((vec)a);
    }
    const square_vec out = sums(folded);
    for (int64_t j = 0; j < units; j++) y[u + j] = out[j];
  }
}

// Where AVX512-FP16 is (Intel's processors since Sapphire Rapids), the instruction is faster than single loads. On AMD's
// it is slower, and on older ones of Intel a mitigation slows it down.
bool gathers_fast() {
  unsigned a, b, c, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 23 & 1);
}
#endif

template <class T>
bool gather_one(const Pattern& p, const float* x, const T* values, float* y, int64_t u0, int64_t u1) {
  enum { PART = 128 };  // units at a time: their indices are still in the L1 cache after the check
#ifdef GATHERS
  static const bool fast = gathers_fast();
#endif
  for (int64_t u = u0, end; u < u1; u = end) {
    end = least(u + PART, u1);
    if (!sound_units(p, u, end)) return false;
    if (p.height == 4) gather_row_runs<quad, 1>(p, x, values, y, u, end);
    else if (p.height == 8) gather_row_runs<square_vec, 8 / SQUARE>(p, x, values, y, u, end);
    else if (p.height == 16) gather_row_runs<vec, 16 / LANES>(p, x, values, y, u, end);
#ifdef GATHERS
    else if (fast) gather_row_by_instruction(p, x, values, y, u, end);
#endif
    else gather_row(p, x, values, y, u, end);
  }
  return true;
}

}  // namespace
