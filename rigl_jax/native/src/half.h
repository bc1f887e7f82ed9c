// Products of bfloat16 activations with a sparse matrix of bfloat16 weights, by instructions that multiply two pairs of
// bfloat16 in each lane and add both products to a float (AVX512-BF16). See kernels.h for tiles.
//
// A pass over two entries interleaves their rows: lane i of the sums is a batch row, whose two activations lie side by
// side. The instruction set interleaves within 128 bits, so a tile holds its rows in the order that comes out right:
// see `place`. The products of a denormal number, and results that are denormal, may count as 0.
#pragma once
#include "linear.h"

namespace {

static_assert(LANES == 16, "a vector of sums has as many lanes as there are pairs");

enum {
  WORDS = 32,            // bfloat16s of a vector
  PARTS = TILE / WORDS,  // vectors of a feature in a tile
  PAIRED = 256,          // entries of a run whose values are paired at a time
  RUN_TILES = 16,        // tiles over which the products of a run are summed together
};
static_assert(int(HALF_SLICE) == int(WORDS) && HALF_SLICE == SLICE * LANES, "a vector of pairs, SLICE vectors of sums");
typedef uint64_t lanes64 __attribute__((vector_size(64)));

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

// Eight rows of WORDS numbers: lane l of r[c] then holds column l * 8 + c of all rows, side by side in 128 bits.
RIGL_INLINE void transpose(words r[8]) {
  words s[8];
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
  for (int i = 0; i < 8; i++) r[i] = s[i];
}

// The first n numbers at p, and zeros.
RIGL_INLINE words first_words(const Half* p, int64_t n) {
#ifdef __AVX512BF16__
  return (words)_mm512_maskz_loadu_epi16((uint32_t)((1ull << n) - 1), p);
#else
  words w = {};
  __builtin_memcpy(&w, p, n * sizeof *p);
  return w;
#endif
}

// out[c * out_step + place(r)] = in[r * in_step + c] for r < WORDS and c < columns; 0 from r = rows on.
void transpose_in(const Half* in, int64_t in_step, int64_t rows, int64_t columns, uint16_t* out, int64_t out_step) {
  // Places [at, at + 8) hold four rows of the lower half of a vector, and four of the upper half.
  for (int64_t at = 0; at < WORDS; at += 8)
    for (int64_t c = 0; c < columns; c += WORDS) {
      const int64_t n = least(columns - c, WORDS);
      words v[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        const int64_t row = at / 2 + i % 4 + i / 4 * 16;
        v[i] = row < rows ? first_words(in + row * in_step + c, n) : words{};
      }
      transpose(v);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++)
#pragma GCC unroll 4
        for (int lane = 0; lane < 4; lane++)
          if (n == WORDS || lane * 8 + i < n)
            __builtin_memcpy(out + (c + lane * 8 + i) * out_step + at, (uint16_t*)&v[i] + lane * 8, 16);
    }
}

// x[batch, features], features [k0, k1) -> tile t, whole: rows after the last one are 0.
void half_tile(const uint16_t* x, uint16_t* tiles, int64_t batch, int64_t features, int64_t t, int64_t k0, int64_t k1) {
  for (int64_t b = t * TILE; b < (t + 1) * TILE; b += WORDS)
    transpose_in((const Half*)x + b * features + k0, features, batch - b, k1 - k0,
                 tiles + (t * features + k0) * TILE + b % TILE, TILE);
}

// ---- y = x W ------------------------------------------------------------------------------------------------------

// As of floats, for U vectors of pairs; two vectors of sums each. Two entries are added at a time.
template <int U, int SETS, class Row>
RIGL_INLINE void weighted_sum(const uint16_t* values, int64_t n, Row row, int64_t x_step, float* y, int64_t y_step,
                              bool first) {
  vec a[SETS][2 * U];
#pragma GCC unroll 16
  for (int k = 0; k < 2 * U; k++) a[0][k] = first ? zero() : load(y + k / 2 * y_step + k % 2 * LANES);
#pragma GCC unroll 4
  for (int s = 1; s < SETS; s++)
#pragma GCC unroll 16
    for (int k = 0; k < 2 * U; k++) a[s][k] = zero();
  const auto add = [&](vec* sums, const uint16_t* x, const uint16_t* other, uint32_t pair) __attribute__((always_inline)) {
    const words w = (words)(lanes32{} + pair);
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) {
      const words p = load(x + u * x_step), q = other ? load(other + u * x_step) : words{};
      sums[2 * u] = multiply_add(sums[2 * u], low_words(p, q), w);
      sums[2 * u + 1] = multiply_add(sums[2 * u + 1], high_words(p, q), w);
    }
  };
  int64_t i = 0;
  for (; i + 2 * SETS <= n; i += 2 * SETS)
#pragma GCC unroll 4
    for (int s = 0; s < SETS; s++)
      add(a[s], row(i + 2 * s), row(i + 2 * s + 1), numbers_at<uint32_t>(values + i + 2 * s));
  for (; SETS > 1 && i + 2 <= n; i += 2) add(a[0], row(i), row(i + 1), numbers_at<uint32_t>(values + i));
  if (i < n) add(a[0], row(i), nullptr, values[i]);
#pragma GCC unroll 4
  for (int s = 1; s < SETS; s++)
#pragma GCC unroll 16
    for (int k = 0; k < 2 * U; k++) a[0][k] += a[s][k];
#pragma GCC unroll 16
  for (int k = 0; k < 2 * U; k++) store(y + k / 2 * y_step + k % 2 * LANES, a[0][k]);
}

// The segments of units [0, units) in one block.
__attribute__((noinline)) void half_gather_pass(const uint16_t* __restrict x, const int32_t* __restrict starts,
                                                int64_t units, const uint16_t* __restrict values,
                                                const uint16_t* __restrict indices, float* __restrict y, bool first) {
  for (int64_t u = 0; u < units; u++, y += TILE) {
    const int64_t s = starts[u], n = starts[u + 1] - s;
    if (n == 0 && !first) continue;
    const uint16_t* index = indices + s;
    weighted_sum<PARTS, 1>(
        values + s, n, [=](int64_t i) { return x + index[i] * TILE; }, WORDS, y, WORDS, first);
  }
}

void half_gather_singles(const Pattern& p, const uint16_t* x, const uint16_t* values, int64_t block, int64_t u0,
                         int64_t u1, float* y) {
  half_gather_pass(x, p.starts + block * p.units + u0, u1 - u0, values, p.indices, y, block == 0);
}

// The values of two entries side by side, output by output: pairs[k * HEIGHT + r] of entries 2 k and 2 k + 1. The last
// entry may have none beside it.
template <int HEIGHT>
RIGL_INLINE void pair_up(const uint16_t* __restrict values, int64_t n, uint32_t* __restrict pairs) {
  for (; n > 1; n -= 2, values += 2 * HEIGHT, pairs += HEIGHT)
    for (int r = 0; r < HEIGHT; r++) pairs[r] = values[r] | (uint32_t)values[HEIGHT + r] << 16;
  for (int r = 0; n && r < HEIGHT; r++) pairs[r] = values[r];
}

// Up to PAIRED entries of one unit: two rows are interleaved once for four outputs. A function of its own, so that its
// pointers stay in registers.
template <int HEIGHT>
__attribute__((noinline)) void half_gather_run(const uint16_t* __restrict x, const uint16_t* __restrict indices,
                                               int64_t n, const uint32_t* __restrict pairs, float* __restrict y,
                                               bool first) {
  alignas(64) static const uint16_t none[TILE] = {};
  const auto row = [&](int64_t k) __attribute__((always_inline)) {
    const uint16_t* one = x + indices[2 * k] * TILE;
    const uint16_t* other = 2 * k + 1 < n ? x + indices[2 * k + 1] * TILE : none;
    Several<words, 2 * PARTS> both;
#pragma GCC unroll 2
    for (int part = 0; part < PARTS; part++) {
      const words a = load(one + part * WORDS), b = load(other + part * WORDS);
      both.v[2 * part] = low_words(a, b);
      both.v[2 * part + 1] = high_words(a, b);
    }
    return both;
  };
  for (int64_t r0 = 0; r0 < HEIGHT; r0 += 4) {
    const auto weight = [&](int64_t k, int r) __attribute__((always_inline)) {
      return (words)(lanes32{} + pairs[k * HEIGHT + r0 + r]);
    };
    gather_run<2 * PARTS>((n + 1) / 2, weight, row, y + r0 * TILE, TILE, first);
  }
}

template <int HEIGHT>
void half_gather_runs(const Pattern& p, const uint16_t* x, const uint16_t* values, int64_t block, int64_t u0,
                      int64_t u1, float* y) {
  uint32_t pairs[PAIRED / 2 * HEIGHT];
  const int32_t* starts = p.starts + block * p.units;
  for (int64_t u = u0; u < u1; u++, y += HEIGHT * TILE) {
    bool first = block == 0;
    for (int64_t i = starts[u]; i < starts[u + 1] || first; i += PAIRED, first = false) {
      const int64_t n = least(PAIRED, starts[u + 1] - i);
      pair_up<HEIGHT>(values + i * HEIGHT, n, pairs);
      half_gather_run<HEIGHT>(x, p.indices + i, n, pairs, y, first);
    }
  }
}

bool half_gather(const Pattern& p, const uint16_t* tiles, const uint16_t* values, Half* y, int64_t batch, int64_t t,
                 int64_t u0, int64_t u1) {
  if (!sound_units(p, u0, u1)) return false;
  alignas(64) float buffer[CHUNK * TILE];
  const auto pass = p.height == 4    ? half_gather_runs<4>
                    : p.height == 8  ? half_gather_runs<8>
                    : p.height == 16 ? half_gather_runs<16>
                                     : half_gather_singles;
  for (int64_t block = 0; block * p.block < p.rows; block++)
    pass(p, tiles + (t * p.rows + block * p.block) * TILE, values, block, u0, u1, buffer);
  const int64_t columns = p.units * p.height, at = t * TILE * columns + u0 * p.height;
  untile(buffer, TILE, (u1 - u0) * p.height, {y, true}, at, columns, least(batch - t * TILE, TILE));
  return true;
}

// ---- dx = dy W^T for runs -----------------------------------------------------------------------------------------

// Outputs of a run that lie side by side are pairs as they are.
template <int HEIGHT>
void half_scatter_pass(const Pattern& p, const uint16_t* dy, const uint16_t* values, int64_t block, float* dx) {
  const int32_t* starts = p.starts + block * p.units;
  for (int64_t u = 0; u < p.units; u++, dy += HEIGHT * TILE) {
    const uint16_t* v = values + starts[u] * (int64_t)HEIGHT;
    words g[HEIGHT / 2][2];
#pragma GCC unroll 8
    for (int r = 0; r < HEIGHT / 2; r++) {
      const words one = load(dy + 2 * r * TILE), other = load(dy + (2 * r + 1) * TILE);
      g[r][0] = low_words(one, other);
      g[r][1] = high_words(one, other);
    }
    const auto weight = [&](int64_t i, int r) __attribute__((always_inline)) {
      return (words)(lanes32{} + numbers_at<uint32_t>(v + i * HEIGHT + 2 * r));
    };
    scatter_run(g, p.indices + starts[u], starts[u + 1] - starts[u], weight, dx);
  }
}

bool half_scatter(const Pattern& p, const uint16_t* dy_tiles, const uint16_t* values, Half* dx, int64_t batch,
                  int64_t slice, int64_t block) {
  if (!sound_block(p, block, 0, p.units)) return false;
  const int64_t row = slice * HALF_SLICE;
  const uint16_t* dy = dy_tiles + row / TILE * TILE * p.units * p.height + row % TILE;
  const auto pass = p.height == 4 ? half_scatter_pass<4> : p.height == 8 ? half_scatter_pass<8> : half_scatter_pass<16>;
  scatter_to(p, {dx, true}, batch, row, HALF_SLICE, block, [&](float* buffer) { pass(p, dy, values, block, buffer); });
  return true;
}

// ---- dW -----------------------------------------------------------------------------------------------------------

bool half_dots(const Pattern& p, const uint16_t* x_tiles, const uint16_t* dy_tiles, float* dvalues, int64_t batch,
               int64_t block, int64_t u0, int64_t u1) {
  if (!sound_block(p, block, u0, u1)) return false;
  for (int64_t t = 0, n; t < tile_count(batch); t += n) {
    const uint16_t* x = x_tiles + t * TILE * p.rows + block * p.block * TILE;
    const uint16_t* dy = dy_tiles + t * TILE * p.units * p.height;
    const int64_t left = tile_count(batch) - t;
    n = p.height > 1 ? least(RUN_TILES, left) : left >= 4 ? 4 : 1;
    if (p.height > 1)
      dots_runs(p, x, dy, TILE, n, block, u0, u1, dvalues, t > 0);
    else if (n == 4)
      dots_pass<PARTS, 4, TILE>(p, x, dy, TILE, block, u0, u1, dvalues, t > 0);
    else
      dots_pass<PARTS, 1, TILE>(p, x, dy, TILE, block, u0, u1, dvalues, t > 0);
  }
  return true;
}

}  // namespace
