// Products of bfloat16 activations with a sparse matrix of bfloat16 weights, by instructions that multiply two pairs of
// bfloat16 in each lane and add both products to a float (AVX512-BF16). Single weights only. See kernels.h for tiles.
//
// A pass over two entries interleaves their rows: lane i of the sums is a batch row, whose two activations lie side by
// side. The instruction set interleaves within 128 bits, so a tile holds its rows in the order that comes out right:
// see `place`. The products of a denormal number may count as 0.
#pragma once
#include "linear.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

static_assert(LANES == 16, "a vector of sums has as many lanes as there are pairs");

enum { WORDS = 32, PARTS = TILE / WORDS };  // bfloat16s of a vector, vectors of a feature in a tile
typedef uint16_t words __attribute__((vector_size(WORDS * 2)));
typedef uint32_t lanes32 __attribute__((vector_size(64)));
typedef uint64_t lanes64 __attribute__((vector_size(64)));

RIGL_INLINE words words_at(const uint16_t* p) {
  words w;
  __builtin_memcpy(&w, p, sizeof w);
  return w;
}

// sums + the product of the pairs, in each lane.
RIGL_INLINE vec pair_products(vec sums, words a, words b) {
#ifdef __AVX512BF16__
  return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
  const lanes32 x = (lanes32)a, y = (lanes32)b;
  sums += (vec)(x & 0xffff0000) * (vec)(y & 0xffff0000);
  return sums + (vec)(x << 16) * (vec)(y << 16);
#endif
}

RIGL_INLINE words low_words(words a, words b) {
  return __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18, 50,
                                 19, 51, 24, 56, 25, 57, 26, 58, 27, 59);
}

RIGL_INLINE words high_words(words a, words b) {
  return __builtin_shufflevector(a, b, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52, 21, 53, 22,
                                 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63);
}

RIGL_INLINE words low_pairs(words a, words b) {
  return (words)__builtin_shufflevector((lanes32)a, (lanes32)b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13,
                                        29);
}

RIGL_INLINE words high_pairs(words a, words b) {
  return (words)__builtin_shufflevector((lanes32)a, (lanes32)b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15,
                                        31);
}

RIGL_INLINE words low_fours(words a, words b) {
  return (words)__builtin_shufflevector((lanes64)a, (lanes64)b, 0, 8, 2, 10, 4, 12, 6, 14);
}

RIGL_INLINE words high_fours(words a, words b) {
  return (words)__builtin_shufflevector((lanes64)a, (lanes64)b, 1, 9, 3, 11, 5, 13, 7, 15);
}

// ---- tiles --------------------------------------------------------------------------------------------------------

// Where batch row `row` of a tile is in the tile's features: interleaving the low words of two vectors then gives rows
// 0 to 15 in order, and the high words rows 16 to 31.
RIGL_INLINE int64_t place(int64_t row) {
  const int64_t in = row % WORDS;
  return row - in + in % 16 / 4 * 8 + in / 16 * 4 + in % 4;
}

// Eight batch rows, of WORDS features each, to places side by side. Column c of the rows is in 128-bit lane c / 8.
RIGL_INLINE void transpose_rows(const uint16_t* const row[8], int64_t k, uint16_t* out) {
  words r[8], s[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) r[i] = words_at(row[i] + k);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) s[i] = low_words(r[i], r[i + 1]), s[i + 1] = high_words(r[i], r[i + 1]);
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = low_pairs(s[i], s[i + 2]), r[i + 1] = high_pairs(s[i], s[i + 2]);
    r[i + 2] = low_pairs(s[i + 1], s[i + 3]), r[i + 3] = high_pairs(s[i + 1], s[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) s[2 * i] = low_fours(r[i], r[i + 4]), s[2 * i + 1] = high_fours(r[i], r[i + 4]);
#pragma GCC unroll 8
  for (int c = 0; c < 8; c++)
#pragma GCC unroll 4
    for (int lane = 0; lane < 4; lane++) __builtin_memcpy(out + (lane * 8 + c) * TILE, (uint16_t*)&s[c] + lane * 8, 16);
}

// x[batch, features], features [k0, k1) -> tile t, whole: rows after the last one are 0.
void half_tile(const uint16_t* x, uint16_t* tiles, int64_t batch, int64_t features, int64_t t, int64_t k0, int64_t k1) {
  uint16_t* out = tiles + t * TILE * features;
  for (int64_t at = 0; at < TILE; at += 8) {
    // Places [at, at + 8) hold four rows of the lower half of a vector, and four of the upper half.
    const uint16_t* row[8];
    bool all = true;
    for (int i = 0; i < 8; i++) {
      const int64_t b = t * TILE + at / WORDS * WORDS + at % WORDS / 2 + i % 4 + i / 4 * 16;
      row[i] = b < batch ? x + b * features : nullptr;
      all &= b < batch;
    }
    int64_t k = k0;
    if (all)
      for (; k + WORDS <= k1; k += WORDS) transpose_rows(row, k, out + k * TILE + at);
    for (; k < k1; k++)
      for (int i = 0; i < 8; i++) out[k * TILE + at + i] = row[i] ? row[i][k] : 0;
  }
}

// ---- y = x W ------------------------------------------------------------------------------------------------------

// The segments of units [0, units) in one block.
__attribute__((noinline)) void half_gather_pass(const uint16_t* __restrict x, const int32_t* __restrict starts,
                                                int64_t units, const uint16_t* __restrict values,
                                                const uint16_t* __restrict indices, float* __restrict y, bool first) {
  for (int64_t u = 0; u < units; u++, y += TILE) {
    int64_t i = starts[u];
    const int64_t end = starts[u + 1];
    if (i == end && !first) continue;
    vec a[2 * PARTS];
#pragma GCC unroll 4
    for (int k = 0; k < 2 * PARTS; k++) a[k] = first ? zero() : load(y + k * LANES);
    const auto add = [&](const uint16_t* row, const uint16_t* other, uint32_t pair) __attribute__((always_inline)) {
      const words w = (words)(lanes32{} + pair);
#pragma GCC unroll 2
      for (int k = 0; k < PARTS; k++) {
        const words p = words_at(row + k * WORDS), q = other ? words_at(other + k * WORDS) : words{};
        a[2 * k] = pair_products(a[2 * k], low_words(p, q), w);
        a[2 * k + 1] = pair_products(a[2 * k + 1], high_words(p, q), w);
      }
    };
    for (; i + 2 <= end; i += 2) {
      uint32_t pair;
      __builtin_memcpy(&pair, values + i, sizeof pair);
      add(x + indices[i] * TILE, x + indices[i + 1] * TILE, pair);
    }
    if (i < end) add(x + indices[i] * TILE, nullptr, values[i]);
#pragma GCC unroll 4
    for (int k = 0; k < 2 * PARTS; k++) store(y + k * LANES, a[k]);
  }
}

bool half_gather(const Pattern& p, const uint16_t* tiles, const uint16_t* values, Half* y, int64_t batch, int64_t t,
                 int64_t u0, int64_t u1) {
  if (!sound_units(p, u0, u1)) return false;
  alignas(64) float buffer[CHUNK * TILE];
  const uint16_t* x = tiles + t * TILE * p.rows;
  for (int64_t block = 0, first = 0; first < p.rows; block++, first += p.block)
    half_gather_pass(x + first * TILE, p.starts + block * p.units + u0, u1 - u0, values, p.indices, buffer, block == 0);
  untile(buffer, TILE, u1 - u0, {y, true}, t * TILE * p.units + u0, p.units, least(batch - t * TILE, TILE));
  return true;
}

// ---- dW -----------------------------------------------------------------------------------------------------------

template <int TILES>
void half_dots_pass(const Pattern& p, const uint16_t* x, const uint16_t* dy, int64_t block, int64_t u0, int64_t u1,
                    float* dvalues, bool add) {
  const int64_t x_tile = p.rows * TILE, dy_tile = p.units * TILE;
  words g[TILES][PARTS];
  const auto begin = [&](int64_t u) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int t = 0; t < TILES; t++)
#pragma GCC unroll 2
      for (int k = 0; k < PARTS; k++) g[t][k] = words_at(dy + t * dy_tile + u * TILE + k * WORDS);
  };
  const auto sum = [&](int64_t index) __attribute__((always_inline)) {
    const uint16_t* row = x + index * TILE;
    vec a = zero(), b = zero();
#pragma GCC unroll 4
    for (int t = 0; t < TILES; t++) {
      a = pair_products(a, words_at(row + t * x_tile), g[t][0]);
      b = pair_products(b, words_at(row + t * x_tile + WORDS), g[t][1]);
    }
    return a + b;
  };
  sum_entries(p, block, u0, u1, dvalues, add, begin, sum);
}

bool half_dots(const Pattern& p, const uint16_t* x_tiles, const uint16_t* dy_tiles, float* dvalues, int64_t batch,
               int64_t block, int64_t u0, int64_t u1) {
  static_assert(PARTS == 2, "two chains of sums");
  if (!sound_block(p, block, u0, u1)) return false;
  for (int64_t t = 0, n; t < tile_count(batch); t += n) {
    const uint16_t* x = x_tiles + t * TILE * p.rows + block * p.block * TILE;
    const uint16_t* dy = dy_tiles + t * TILE * p.units;
    n = tile_count(batch) - t >= 4 ? 4 : 1;
    (n == 4 ? half_dots_pass<4> : half_dots_pass<1>)(p, x, dy, block, u0, u1, dvalues, t > 0);
  }
  return true;
}

}  // namespace
