// The inner loops that matrix products and convolutions share.
#pragma once
#include "kernels.h"
#include "vector.h"

namespace {

// Vectors of accumulators that one pass over a segment keeps: eight hide the latency of two multiply-adds a cycle.
#if LANES == 16
enum { WIDE = 4, NARROW = 4, DOTS = 4 };
#else
enum { WIDE = 8, NARROW = 2, DOTS = 2 };
#endif

// Whether starts[0] ... starts[count] never fall and lie within [0, entries].
bool rising(const int32_t* starts, int64_t count, int64_t entries) {
  if (!CHECKED) return true;
  int32_t falls = 0;
  for (int64_t i = 0; i < count; i++) falls |= starts[i + 1] < starts[i];
  return !falls && starts[0] >= 0 && starts[count] <= entries;
}

// See kernels.h. Plain reductions, which the compiler turns into vectors.
bool sound(const uint16_t* indices, const int32_t* starts, int64_t count, int64_t entries, int64_t bound) {
  if (!CHECKED) return true;
  if (!rising(starts, count, entries)) return false;
  uint16_t highest = 0;
  const int64_t end = starts[count];
  for (int64_t i = starts[0]; i < end; i++) highest = indices[i] > highest ? indices[i] : highest;
  return highest < bound || starts[0] == starts[count];
}

bool reorder(const float* values, int64_t n, const int32_t* order, int64_t count, float* out) {
  enum { PART = 2048 };  // what is checked is still in the nearest cache when it is used
  for (int64_t i = 0; i < count; i += PART) {
    const int64_t end = least(count, i + PART);
    int32_t sign = 0;
    for (int64_t k = i; CHECKED && k < end; k++) sign |= order[k] | (int32_t)((uint32_t)(n - 1) - (uint32_t)order[k]);
    if (sign < 0) return false;
    for (int64_t k = i; k < end; k++) out[k] = values[order[k]];
  }
  return true;
}

// y[u * y_step ...] (+)= sum over i < n of values[i] * (vector u at row(i) + u * x_step), for u < U vectors. SETS chains
// of additions run side by side where U alone is too short to hide their latency.
template <int U, int SETS, class Row>
RIGL_INLINE void weighted_sum(const float* values, int64_t n, Row row, int64_t x_step, float* y, int64_t y_step,
                              bool first) {
  vec a[SETS][U];
#pragma GCC unroll 16
  for (int u = 0; u < U; u++) a[0][u] = first ? zero() : load(y + u * y_step);
#pragma GCC unroll 4
  for (int s = 1; s < SETS; s++)
#pragma GCC unroll 16
    for (int u = 0; u < U; u++) a[s][u] = zero();
  int64_t i = 0;
  for (; i + SETS <= n; i += SETS)
#pragma GCC unroll 4
    for (int s = 0; s < SETS; s++) {
      const float* x = row(i + s);
      const vec w = splat(values[i + s]);
#pragma GCC unroll 16
      for (int u = 0; u < U; u++) a[s][u] += w * load(x + u * x_step);
    }
  for (; SETS > 1 && i < n; i++) {
    const float* x = row(i);
    const vec w = splat(values[i]);
#pragma GCC unroll 16
    for (int u = 0; u < U; u++) a[0][u] += w * load(x + u * x_step);
  }
#pragma GCC unroll 4
  for (int s = 1; s < SETS; s++)
#pragma GCC unroll 16
    for (int u = 0; u < U; u++) a[0][u] += a[s][u];
#pragma GCC unroll 16
  for (int u = 0; u < U; u++) store(y + u * y_step, a[0][u]);
}

// out[c * out_step + r] = in[r * in_step + c] for r, c < SQUARE.
RIGL_INLINE void transpose_square(const float* in, int64_t in_step, float* out, int64_t out_step) {
  square_vec v[SQUARE];
#pragma GCC unroll 8
  for (int i = 0; i < SQUARE; i++) v[i] = square_load(in + i * in_step);
  transpose(v);
#pragma GCC unroll 8
  for (int i = 0; i < SQUARE; i++) square_store(out + i * out_step, v[i]);
}

// The same for r < rows, c < columns. The rows read are far apart, perhaps a power of two, so eight at a time and whole
// cache lines of each.
RIGL_INLINE void transpose_in(const float* in, int64_t in_step, int64_t rows, int64_t columns, float* out,
                              int64_t out_step) {
  enum { PANEL = 64 };  // columns at a time: what is written of them stays in the nearest cache
  for (int64_t first = 0; first < columns; first += PANEL) {
    const int64_t last = least(columns, first + PANEL), whole = first + (last - first) / SQUARE * SQUARE;
    int64_t r = 0;
    for (; r + SQUARE <= rows; r += SQUARE) {
      for (int64_t c = first; c < whole; c += SQUARE)
        transpose_square(in + r * in_step + c, in_step, out + c * out_step + r, out_step);
      for (int64_t c = whole; c < last; c++)
        for (int i = 0; i < SQUARE; i++) out[c * out_step + r + i] = in[(r + i) * in_step + c];
    }
    for (; r < rows; r++)
      for (int64_t c = first; c < last; c++) out[c * out_step + r] = in[r * in_step + c];
  }
}

// The same, where it is the rows written that are far apart: each is written from end to end.
RIGL_INLINE void transpose_out(const float* in, int64_t in_step, int64_t rows, int64_t columns, float* out,
                               int64_t out_step) {
  const int64_t whole = rows / SQUARE * SQUARE;
  int64_t c = 0;
  for (; c + SQUARE <= columns; c += SQUARE) {
    for (int64_t r = 0; r < whole; r += SQUARE)
      transpose_square(in + r * in_step + c, in_step, out + c * out_step + r, out_step);
    for (int64_t r = whole; r < rows; r++)
      for (int i = 0; i < SQUARE; i++) out[(c + i) * out_step + r] = in[r * in_step + c + i];
  }
  for (; c < columns; c++)
    for (int64_t r = 0; r < rows; r++) out[c * out_step + r] = in[r * in_step + c];
}

// Sums of single entries wait here, one vector each, until SQUARE of them can be reduced together: a segment may hold
// one entry or many, and the reduction never has to know.
struct Pending {
  enum { SIZE = 64 };
  square_vec sum[SIZE];
  int64_t held = 0;
  float* out;

  RIGL_INLINE void flush(bool add) {
    for (int64_t i = held; i % SQUARE; i++) sum[i] = square_vec{};
    for (int64_t i = 0; i < held; i += SQUARE) {
      const square_vec v = sums(sum + i);
      if (i + SQUARE <= held) {
        square_store(out + i, add ? square_load(out + i) + v : v);
      } else {
        for (int64_t k = 0; k < held - i; k++) out[i + k] = add ? out[i + k] + v[k] : v[k];
      }
    }
    out += held;
    held = 0;
  }
};

int64_t spin(int64_t rounds, float* out) {
  enum { CHAINS = 10 };
  vec a[CHAINS];
  const vec m = splat(0.999f), c = splat(0.001f);
#pragma GCC unroll 16
  for (int k = 0; k < CHAINS; k++) a[k] = splat((float)k);
  for (int64_t i = 0; i < rounds; i++)
#pragma GCC unroll 16
    for (int k = 0; k < CHAINS; k++) a[k] = a[k] * m + c;
#pragma GCC unroll 16
  for (int k = 1; k < CHAINS; k++) a[0] += a[k];
  store(out, a[0]);
  return rounds * CHAINS * LANES * 2;
}

}  // namespace
