// Products of row-major activations with a sparse matrix. See kernels.h for layouts and the pattern.
#pragma once
#include "kernels.h"
#include "row.h"
#include "segment.h"

namespace {

RIGL_INLINE int64_t tile_width(int64_t batch, int64_t t) {
  const int64_t left = batch - t * TILE;
  if (left >= TILE) return TILE;
  return batch == 1 ? 1 : (left + LANES - 1) / LANES * LANES;
}

// ---- conversions --------------------------------------------------------------------------------------------------

void tile(Floats x, float* tiles, int64_t batch, int64_t rows, int64_t t, int64_t k0, int64_t k1) {
  const int64_t width = tile_width(batch, t), b0 = t * TILE, count = least(batch - b0, width), at = b0 * rows + k0;
  float* out = tiles + t * TILE * rows;
  numbers_of(x, at, [&](const auto* from) { transpose_in(from, rows, count, k1 - k0, out + k0 * width, width); });
  for (int64_t k = k0; count < width && k < k1; k++)
    for (int64_t b = count; b < width; b++) out[k * width + b] = 0;
}

// y[at + b * ld + c] = buffer[c][b] for c < columns, b < count. `buffer` has `width` floats to a column.
void untile(const float* buffer, int64_t width, int64_t columns, Floats y, int64_t at, int64_t ld, int64_t count) {
  numbers_of(y, at, [&](auto* to) { transpose_out(buffer, width, columns, count, to, ld); });
}

// ---- y = x W: every entry adds its row to its unit ----------------------------------------------------------------

template <class V, int U>
struct Several {
  V v[U];
};

// Four outputs of a run times U vectors: y[r] (+)= sum over k < n of weight(k, r) * row(k), so each vector of a row serves
// four products. A row is Several vectors of floats, or of pairs of bfloat16s.
template <int U, class Weight, class Row>
RIGL_INLINE void gather_run(int64_t n, const Weight& weight, const Row& row, float* y, int64_t width, bool first) {
  vec a[4][U];
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) a[r][u] = first ? zero() : load(y + r * width + u * LANES);
  for (int64_t k = 0; k < n; k++) {
    const auto x = row(k);
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      const auto w = weight(k, r);
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) a[r][u] = multiply_add(a[r][u], w, x.v[u]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) store(y + r * width + u * LANES, a[r][u]);
}

// The segments of units [0, units) in one block. A function of its own with plain pointers, so that all of them stay in
// registers.
template <int U, int SETS, int64_t STRIDE>
__attribute__((noinline)) void gather_pass(const float* __restrict x, int64_t width, const int32_t* __restrict starts,
                                           int64_t units, const float* __restrict values,
                                           const uint16_t* __restrict indices, float* __restrict y, bool first) {
  const int64_t stride = STRIDE ? STRIDE : width;
  for (int64_t u = 0; u < units; u++, y += stride) {
    const int64_t s = starts[u], n = starts[u + 1] - s;
    if (n == 0 && !first) continue;
    const uint16_t* index = indices + s;
    weighted_sum<U, SETS>(
        values + s, n, [=](int64_t i) { return x + index[i] * stride; }, LANES, y, LANES, first);
  }
}

template <int U>
void gather_run_pass(const Pattern& p, const float* x, int64_t width, int64_t block, int64_t u0, int64_t u1,
                     const float* values, float* y) {
  const int32_t* starts = p.starts + block * p.units;
  for (int64_t u = u0; u < u1; u++) {
    const int64_t s = starts[u], n = starts[u + 1] - s;
    if (n == 0 && block > 0) continue;
    for (int64_t r = 0; r < p.height; r += 4)
      for (int64_t b = 0; b < width; b += U * LANES) {
        const float* v = values + s * p.height + r;
        const auto weight = [&](int64_t k, int r) __attribute__((always_inline)) { return splat(v[k * p.height + r]); };
        const auto row = [&](int64_t k) __attribute__((always_inline)) {
          Several<vec, U> vectors;
#pragma GCC unroll 4
          for (int u = 0; u < U; u++) vectors.v[u] = load(x + p.indices[s + k] * width + b + u * LANES);
          return vectors;
        };
        gather_run<U>(n, weight, row, y + ((u - u0) * p.height + r) * width + b, width, block == 0);
      }
  }
}

void gather_block(const Pattern& p, const float* x, int64_t width, int64_t block, int64_t u0, int64_t u1,
                         const float* values, float* y) {
  if (p.height > 1) {
    if (width % (NARROW * LANES) == 0) return gather_run_pass<NARROW>(p, x, width, block, u0, u1, values, y);
    return gather_run_pass<1>(p, x, width, block, u0, u1, values, y);
  }
  const int32_t* starts = p.starts + block * p.units + u0;
  const int64_t units = u1 - u0;
  const bool first = block == 0;
  int64_t b = 0;
  if (width == TILE) {
    for (; b < TILE; b += WIDE * LANES)
      gather_pass<WIDE, 8 / WIDE, TILE>(x + b, width, starts, units, values, p.indices, y + b, first);
    return;
  }
  for (; b + 4 * LANES <= width; b += 4 * LANES)
    gather_pass<4, 2, 0>(x + b, width, starts, units, values, p.indices, y + b, first);
  for (; b + 2 * LANES <= width; b += 2 * LANES)
    gather_pass<2, 4, 0>(x + b, width, starts, units, values, p.indices, y + b, first);
  for (; b < width; b += LANES)
    gather_pass<1, 4, 0>(x + b, width, starts, units, values, p.indices, y + b, first);
}

bool gather(const Pattern& p, const float* tiles, Floats numbers, Floats y, int64_t batch, int64_t t, int64_t u0,
            int64_t u1) {
  if (numbers.half) return gather_one(p, tiles, (const Half*)numbers.data, (float*)y.data, u0, u1);
  const float* values = (const float*)numbers.data;
  if (batch == 1) return gather_one(p, tiles, values, (float*)y.data, u0, u1);
  if (!sound_units(p, u0, u1)) return false;
  alignas(64) float buffer[CHUNK * TILE];
  const int64_t width = tile_width(batch, t), columns = p.units * p.height;
  const float* x = tiles + t * TILE * p.rows;
  for (int64_t block = 0, first = 0; first < p.rows; block++, first += p.block)
    gather_block(p, x + first * width, width, block, u0, u1, values, buffer);
  untile(buffer, width, (u1 - u0) * p.height, y, t * TILE * columns + u0 * p.height, columns,
         least(batch - t * TILE, width));
  return true;
}

// ---- dx = dy W^T for runs: every entry adds its unit to its row ---------------------------------------------------

// R outputs of a run, or pairs of outputs, times U vectors: adds weight(i, r) * g[r] to the row of entry i, for i < n.
template <int R, int U, class V, class Weight>
RIGL_INLINE void scatter_run(const V (&g)[R][U], const uint16_t* indices, int64_t n, const Weight& weight, float* dx) {
  for (int64_t i = 0; i < n; i++) {
    float* row = dx + (int64_t)indices[i] * (U * LANES);
    vec a[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) a[u] = load(row + u * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const auto w = weight(i, r);
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) a[u] = multiply_add(a[u], w, g[r][u]);
    }
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) store(row + u * LANES, a[u]);
  }
}

// Adds the units of one block to `slice` floats of each row of dx.
template <int R, int U>
void scatter_pass(const Pattern& p, const float* dy, int64_t width, const float* values, int64_t block, float* dx) {
  const int32_t* starts = p.starts + block * p.units;
  const int64_t height = p.height;  // in a register: the compiler cannot tell that dx is not p
  for (int64_t u = 0; u < p.units; u++) {
    const int64_t s = starts[u], n = starts[u + 1] - s;
    for (int64_t first = 0; first < height; first += R) {
      const float* v = values + s * height + first;
      vec g[R][U];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int k = 0; k < U; k++) g[r][k] = load(dy + (u * height + first + r) * width + k * LANES);
      const auto weight = [=](int64_t i, int r) __attribute__((always_inline)) { return splat(v[i * height + r]); };
      scatter_run(g, p.indices + s, n, weight, dx);
    }
  }
}

// The rows of one block of dx, of `floats` batch rows from `row` on: what add(buffer) adds to zeros.
template <class Add>
void scatter_to(const Pattern& p, Floats dx, int64_t batch, int64_t row, int64_t floats, int64_t block, const Add& add) {
  const int64_t first = block * p.block, rows = least(p.block, p.rows - first);
  alignas(64) float buffer[RUN_BLOCK * SLICE * LANES];
  for (int64_t k = 0; k < rows * floats; k++) buffer[k] = 0;
  add(buffer);
  untile(buffer, floats, rows, dx, row * p.rows + first, p.rows, least(batch - row, floats));
}

bool scatter(const Pattern& p, const float* dy_tiles, const float* values, Floats result, int64_t batch, int64_t slice,
             int64_t block) {
  if (!sound_block(p, block, 0, p.units)) return false;
  const int64_t first = block * p.block, rows = least(p.block, p.rows - first), columns = p.units * p.height;
  const int32_t* starts = p.starts + block * p.units;
  if (batch == 1) {
    float* dx = (float*)result.data;
    for (int64_t k = 0; k < rows; k++) dx[first + k] = 0;
    for (int64_t u = 0; u < p.units; u++)
      for (int64_t i = starts[u]; i < starts[u + 1]; i++) {
        float a = 0;
        for (int64_t r = 0; r < p.height; r++) a += values[i * p.height + r] * dy_tiles[u * p.height + r];
        dx[first + p.indices[i]] += a;
      }
    return true;
  }
  constexpr int U = SLICE;
  const int64_t row = slice * U * LANES, t = row / TILE, b = row % TILE, width = tile_width(batch, t);
  const float* dy = dy_tiles + t * TILE * columns + b;
  const bool narrow = b + U * LANES > width;
  scatter_to(p, result, batch, row, narrow ? LANES : U * LANES, block, [&](float* buffer) {
    if (narrow)
      scatter_pass<4, 1>(p, dy, width, values, block, buffer);
    else if (LONG > 4 && p.height % LONG == 0)
      scatter_pass<LONG, U>(p, dy, width, values, block, buffer);
    else
      scatter_pass<4, U>(p, dy, width, values, block, buffer);
  });
  return true;
}

// ---- dW: for every entry the products of its row and its unit, summed over the batch ------------------------------

// dvalues of the segments of units u0..u1 in one block: begin(u) reads a unit, and sum(index) is the sum of the products of an
// entry, one number a lane.
template <class Begin, class Sum>
RIGL_INLINE void sum_entries(const Pattern& p, int64_t block, int64_t u0, int64_t u1, float* dvalues, bool add,
                             const Begin& begin, const Sum& sum) {
  const int32_t* starts = p.starts + block * p.units;
  Pending pending;
  pending.out = dvalues + starts[u0];
  for (int64_t u = u0; u < u1; u++) {
    int64_t i = starts[u];
    const int64_t end = starts[u + 1];
    if (i == end) continue;
    begin(u);
    while (i < end) {
      const int64_t stop = least(end, i + Pending::SIZE - pending.held);
      square_vec* folded = pending.sum + pending.held;
      pending.held += stop - i;
      for (; i < stop; i++) *folded++ = fold(sum(p.indices[i]));
      if (pending.held == Pending::SIZE) pending.flush(add);
    }
  }
  pending.flush(add);
}

// U vectors of each of TILES tiles.
template <int U, int TILES, int64_t STRIDE, class T>
void dots_pass(const Pattern& p, const T* x, const T* dy, int64_t width, int64_t block, int64_t u0, int64_t u1,
               float* dvalues, bool add) {
  const int64_t stride = STRIDE ? STRIDE : width, x_tile = p.rows * TILE, dy_tile = p.units * TILE;
  decltype(load(x)) g[TILES][U];
  const auto begin = [&](int64_t u) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int t = 0; t < TILES; t++)
#pragma GCC unroll 16
      for (int k = 0; k < U; k++) g[t][k] = load(dy + t * dy_tile + u * stride + k * STEP<T>);
  };
  const auto sum = [&](int64_t index) __attribute__((always_inline)) {
    const T* row = x + index * stride;
    vec a[2] = {};
#pragma GCC unroll 4
    for (int t = 0; t < TILES; t++)
#pragma GCC unroll 16
      for (int k = 0; k < U; k++) a[k % 2] = multiply_add(a[k % 2], load(row + t * x_tile + k * STEP<T>), g[t][k]);
    return U > 1 ? a[0] + a[1] : a[0];
  };
  sum_entries(p, block, u0, u1, dvalues, add, begin, sum);
}

// COUNT entries of a run times four of its outputs, over the whole width of `tiles` tiles: the sums over the lanes,
// which cost as much as the products of one tile, are made once for all of them.
template <int COUNT, class T>
RIGL_INLINE void dots_run(const T* x, int64_t x_tile, const T* dy, int64_t dy_tile, int64_t width, int64_t tiles,
                          int64_t height, const uint16_t* indices, float* dvalues, bool add) {
  vec a[COUNT * 4];
#pragma GCC unroll 16
  for (int k = 0; k < COUNT * 4; k++) a[k] = zero();
  const T* row[COUNT];
#pragma GCC unroll 4
  for (int c = 0; c < COUNT; c++) row[c] = x + indices[c] * width;
#pragma GCC unroll 2
  for (int64_t t = 0; t < tiles; t++)
    for (int64_t b = 0; b < width; b += STEP<T>) {
      decltype(load(x)) g[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) g[r] = load(dy + t * dy_tile + r * width + b);
#pragma GCC unroll 4
      for (int c = 0; c < COUNT; c++) {
        const auto v = load(row[c] + t * x_tile + b);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) a[c * 4 + r] = multiply_add(a[c * 4 + r], v, g[r]);
      }
    }
  constexpr int PADDED = (COUNT * 4 + SQUARE - 1) / SQUARE * SQUARE;
  square_vec folded[PADDED];
#pragma GCC unroll 16
  for (int k = 0; k < PADDED; k++) folded[k] = k < COUNT * 4 ? fold(a[k]) : square_vec{};
  float out[PADDED];
#pragma GCC unroll 4
  for (int k = 0; k < PADDED; k += SQUARE) square_store(out + k, sums(folded + k));
  typedef quad Loose __attribute__((aligned(4), may_alias));
#pragma GCC unroll 4
  for (int c = 0; c < COUNT; c++) {
    Loose* d = (Loose*)(dvalues + c * height);
    const quad v = *(const Loose*)(out + c * 4);
    *d = add ? *d + v : v;
  }
}

// The rows of x of a few entries stay in the L1 cache for all outputs of the run.
template <class T>
void dots_runs(const Pattern& p, const T* x, const T* dy, int64_t width, int64_t tiles, int64_t block, int64_t u0,
               int64_t u1, float* dvalues, bool add) {
  const int32_t* starts = p.starts + block * p.units;
  const int64_t h = p.height, x_tile = p.rows * TILE, dy_tile = p.units * h * TILE;
  for (int64_t u = u0; u < u1; u++) {
    const T* g = dy + u * h * width;
    int64_t i = starts[u];
    for (; i + DOTS <= starts[u + 1]; i += DOTS)
      for (int64_t r = 0; r < h; r += 4)
        dots_run<DOTS>(x, x_tile, g + r * width, dy_tile, width, tiles, h, p.indices + i, dvalues + i * h + r, add);
    for (; i < starts[u + 1]; i++)
      for (int64_t r = 0; r < h; r += 4)
        dots_run<1>(x, x_tile, g + r * width, dy_tile, width, tiles, h, p.indices + i, dvalues + i * h + r, add);
  }
}

// Single weights, one tile.
void dots_tile(const Pattern& p, const float* x, const float* dy, int64_t width, int64_t block, int64_t u0, int64_t u1,
               float* dvalues, bool add) {
  int64_t b = 0;
  if (width == TILE)
    for (; b < TILE; b += WIDE * LANES, add = true)
      dots_pass<WIDE, 1, TILE>(p, x + b, dy + b, width, block, u0, u1, dvalues, add);
  for (; b + 2 * LANES <= width; b += 2 * LANES, add = true)
    dots_pass<2, 1, 0>(p, x + b, dy + b, width, block, u0, u1, dvalues, add);
  for (; b < width; b += LANES, add = true)
    dots_pass<1, 1, 0>(p, x + b, dy + b, width, block, u0, u1, dvalues, add);
}

void dots_row(const Pattern& p, const float* x, const float* dy, float* dvalues, int64_t block, int64_t u0,
                     int64_t u1) {
  const int32_t* starts = p.starts + block * p.units;
  for (int64_t u = u0; u < u1; u++)
    for (int64_t i = starts[u]; i < starts[u + 1]; i++)
      for (int64_t r = 0; r < p.height; r++)
        dvalues[i * p.height + r] = x[block * p.block + p.indices[i]] * dy[u * p.height + r];
}

bool dots(const Pattern& p, const float* x_tiles, const float* dy_tiles, float* dvalues, int64_t batch,
                 int64_t block, int64_t u0, int64_t u1) {
  if (!sound_block(p, block, u0, u1)) return false;
  if (batch == 1) dots_row(p, x_tiles, dy_tiles, dvalues, block, u0, u1);
  if (batch == 1) return true;
  const int64_t most = p.height > 1 ? 4 : PAIRS ? 2 : 1;  // tiles together
  for (int64_t t = 0, n; t < tile_count(batch); t += n) {
    const int64_t width = tile_width(batch, t);
    const float* x = x_tiles + t * TILE * p.rows + block * p.block * width;
    const float* dy = dy_tiles + t * TILE * p.units * p.height;
    n = least(most, batch / TILE - t);  // whole ones; the last one may be a part
    n = n < 1 ? 1 : n;
    if (p.height > 1)
      dots_runs(p, x, dy, width, n, block, u0, u1, dvalues, t > 0);
    else if (n == 1)
      dots_tile(p, x, dy, width, block, u0, u1, dvalues, t > 0);
    else if constexpr (PAIRS)
      dots_pass<TILE / LANES, 2, TILE>(p, x, dy, width, block, u0, u1, dvalues, t > 0);
  }
  return true;
}

}  // namespace
