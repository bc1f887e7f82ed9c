// Inner loops of matrix products and convolutions.
#pragma once
#include "kernels.h"
#include "vector.h"

namespace {

// Accumulators (vectors) in one pass over a segment: eight hide the latency of two multiply-adds a cycle.
// PAIRS: whether there are registers to hold two tiles of a unit. LONG: outputs of a run that registers hold.
#if LANES == 16
enum { WIDE = 4, NARROW = 4, DOTS = 4, PAIRS = 1, LONG = 8 };
#else
enum { WIDE = 8, NARROW = 2, DOTS = 2, PAIRS = 0, LONG = 4 };
#endif

// Whether any f(k) has its highest bit set, for k from 0 to count - 1. Reads LANES numbers at a time; the last vector
// may overlap the one before. f(k, T()) reads a T, a vector or a number, at k.
template <class F>
RIGL_INLINE bool any_highest_bit(int64_t count, const F& f) {
  typedef uint32_t Lanes __attribute__((vector_size(LANES * 4)));
  uint32_t any = 0;
  if (count >= LANES) {
    Lanes found = f(count - LANES, Lanes());
    for (int64_t k = 0; k + LANES <= count; k += LANES) found |= f(k, Lanes());
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) any |= found[i];
  } else {
    for (int64_t k = 0; k < count; k++) any |= f(k, uint32_t());
  }
  return any >> 31;
}

template <class T>
RIGL_INLINE T numbers_at(const void* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

// Whether all of order[0] ... order[count - 1] are in [0, last], with last < 2^31.
RIGL_INLINE bool all_below(const int32_t* order, int64_t count, uint32_t last) {
  return !any_highest_bit(count, [=](int64_t k, auto type) {
    const auto at = numbers_at<decltype(type)>(order + k);
    return at | (last - at);
  });
}

// The highest of indices[0] ... indices[count - 1]; the last vector may overlap the one before.
RIGL_INLINE uint16_t highest(const uint16_t* indices, int64_t count) {
  enum { WIDTH = 2 * LANES };
  typedef uint16_t Lanes __attribute__((vector_size(WIDTH * 2)));
  uint16_t top = 0;
  if (count >= WIDTH) {
    Lanes found = numbers_at<Lanes>(indices + count - WIDTH);
    for (int64_t k = 0; k + WIDTH <= count; k += WIDTH) {
      const Lanes next = numbers_at<Lanes>(indices + k);
      found = next > found ? next : found;
    }
    for (int i = 0; i < WIDTH; i++) top = found[i] > top ? found[i] : top;
  } else {
    for (int64_t k = 0; k < count; k++) top = indices[k] > top ? indices[k] : top;
  }
  return top;
}

// See kernels.h.
bool sound(const uint16_t* indices, const int32_t* starts, int64_t count, int64_t entries, int64_t bound) {
  if (!CHECKED) return true;
  const bool falls = any_highest_bit(count, [=](int64_t k, auto type) {
    const auto end = numbers_at<decltype(type)>(starts + k + 1);
    return end | (end - numbers_at<decltype(type)>(starts + k));
  });
  if (falls || starts[0] < 0 || starts[count] > entries) return false;
  return starts[0] == starts[count] || highest(indices + starts[0], starts[count] - starts[0]) < bound;
}

// Whether the segments of units u0..u1 in one block may be used; see kernels.h.
RIGL_INLINE bool sound_block(const Pattern& p, int64_t block, int64_t u0, int64_t u1) {
  const int64_t rows = least(p.block, p.rows - block * p.block);
  return sound(p.indices, p.starts + block * p.units + u0, u1 - u0, p.entries, rows);
}

RIGL_INLINE bool sound_units(const Pattern& p, int64_t u0, int64_t u1) {
  for (int64_t block = 0; block * p.block < p.rows; block++)
    if (!sound_block(p, block, u0, u1)) return false;
  return true;
}

// See kernels.h. The first pass checks, the second one reads the same indices from the L1 cache.
template <class T>
bool reorder(const T* values, int64_t n, const int32_t* order, int64_t count, T* out) {
  if (n == 0) return count == 0;
  enum { PART = 256 };
  for (int64_t i = 0; i < count; i += PART) {
    const int64_t end = least(count, i + PART);
    if (CHECKED && !all_below(order + i, end - i, (uint32_t)(n - 1))) return false;
    for (int64_t k = i; k < end; k++) out[k] = values[order[k]];
  }
  return true;
}

// y[u * y_step ...] (+)= sum over i < n of values[i] * (vector u at row(i) + u * x_step), for u < U vectors. SETS
// chains of additions run side by side where U alone is too short to hide their latency.
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
template <class In, class Out>
RIGL_INLINE void transpose_square(const In* in, int64_t in_step, Out* out, int64_t out_step) {
  square_vec v[SQUARE];
#pragma GCC unroll 8
  for (int i = 0; i < SQUARE; i++) v[i] = square_load(in + i * in_step);
  transpose(v);
#pragma GCC unroll 8
  for (int i = 0; i < SQUARE; i++) square_store(out + i * out_step, v[i]);
}

// The same for r < 2 * SQUARE: two rows side by side in the lanes. Returns false, and does nothing, where it cannot.
RIGL_INLINE bool transpose_two(const float*, int64_t, float*, int64_t) { return false; }
RIGL_INLINE bool transpose_two(const float* in, int64_t in_step, Half* out, int64_t out_step) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  square_vec v[SQUARE];
#pragma GCC unroll 8
  for (int i = 0; i < SQUARE; i++) {
    const float* row = in + 2 * i * in_step;
    v[i] = rounded_pairs(square_load(row), square_load(row + in_step));
  }
  transpose(v);
#pragma GCC unroll 8
  for (int i = 0; i < SQUARE; i++) __builtin_memcpy(out + i * out_step, &v[i], sizeof v[i]);
  return true;
#else
  return false;
#endif
}

// The same for r < rows, c < columns. The rows of `in` are far apart, perhaps by a power of two, so whole cache lines
// of eight rows are read at a time.
template <class In>
RIGL_INLINE void transpose_in(const In* in, int64_t in_step, int64_t rows, int64_t columns, float* out,
                              int64_t out_step) {
  enum { PANEL = 64 };  // columns at a time: their output stays in the L1 cache
  for (int64_t first = 0; first < columns; first += PANEL) {
    const int64_t last = least(columns, first + PANEL), whole = first + (last - first) / SQUARE * SQUARE;
    int64_t r = 0;
    for (; r + SQUARE <= rows; r += SQUARE) {
      for (int64_t c = first; c < whole; c += SQUARE)
        transpose_square(in + r * in_step + c, in_step, out + c * out_step + r, out_step);
      for (int64_t c = whole; c < last; c++)
        for (int i = 0; i < SQUARE; i++) out[c * out_step + r + i] = number(in[(r + i) * in_step + c]);
    }
    for (; r < rows; r++)
      for (int64_t c = first; c < last; c++) out[c * out_step + r] = number(in[r * in_step + c]);
  }
}

// The same for rows of `out` that are far apart: each is written from start to end.
template <class Out>
RIGL_INLINE void transpose_out(const float* in, int64_t in_step, int64_t rows, int64_t columns, Out* out,
                               int64_t out_step) {
  int64_t c = 0;
  for (; c + SQUARE <= columns; c += SQUARE) {
    int64_t r = 0;
    while (r + 2 * SQUARE <= rows && transpose_two(in + r * in_step + c, in_step, out + c * out_step + r, out_step))
      r += 2 * SQUARE;
    for (; r + SQUARE <= rows; r += SQUARE)
      transpose_square(in + r * in_step + c, in_step, out + c * out_step + r, out_step);
    for (; r < rows; r++)
      for (int i = 0; i < SQUARE; i++) put(out + (c + i) * out_step + r, in[r * in_step + c + i]);
  }
  for (; c < columns; c++)
    for (int64_t r = 0; r < rows; r++) put(out + c * out_step + r, in[r * in_step + c]);
}

// f(pointer of number `at` of x, of the type that it has).
template <class F>
RIGL_INLINE void numbers_of(Floats x, int64_t at, const F& f) {
  if (x.half)
    f((Half*)x.data + at);
  else
    f((float*)x.data + at);
}

// Collects the sums of single entries, one vector each, until SQUARE of them can be reduced together, whatever the
// length of the segments.
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
