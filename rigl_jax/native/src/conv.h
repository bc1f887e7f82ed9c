// Convolutions with a sparse kernel. Planes are padded and interleave images: [group][row][channel][pixel][STEP images].
// So a run of pixels in a row is a run of vectors, and a tap of the kernel is an offset. See kernels.h. The numbers T of
// planes and values are floats, or bfloat16s (uint16_t), which `weighted_sum` and `multiply_add` take in pairs.
#pragma once
#include "kernels.h"
#include "segment.h"

namespace {

template <int V>
struct Constant {
  enum { value = V };
};

// ---- NHWC -> planes -----------------------------------------------------------------------------------------------

// Writes zeros to margins, and to images that are missing in the last group.
template <class T, class In>
void planes_of(const Planes& p, const In* x, T* out, int64_t group, int64_t row) {
  constexpr int64_t IMAGES = STEP<T>;
  const int64_t count = least(p.batch - group * IMAGES, IMAGES), y = row - p.top, image = p.height * p.width * p.channels;
  const int64_t line = p.padded_width * IMAGES;
  out += (group * p.padded_height + row) * p.channels * line;
  const bool margin = y < 0 || y >= p.height;
  const int64_t first = least(p.left, p.padded_width), last = least(p.padded_width, p.left + p.width);
  if (margin || count < IMAGES)
    for (int64_t i = 0; i < p.channels * line; i++) out[i] = 0;
  if (margin) return;
  if (count == IMAGES)
    for (int64_t c = 0; c < p.channels; c++) {
      for (int64_t i = 0; i < first * IMAGES; i++) out[c * line + i] = 0;
      for (int64_t i = last * IMAGES; i < line; i++) out[c * line + i] = 0;
    }
  x += group * IMAGES * image + y * p.width * p.channels;
  for (int64_t pixel = first; pixel < last; pixel++)
    transpose_in(x + (pixel - first) * p.channels, image, count, p.channels, out + pixel * IMAGES, line);
}

void planes(const Planes& p, Floats x, float* out, int64_t group, int64_t row) {
  numbers_of(x, 0, [&](const auto* from) { planes_of(p, from, out, group, row); });
}

// Where the units from `first` on find the planes of their group: `next()`, once for each unit, moves on.
struct GroupShift {
  int64_t units, numbers, left;
  GroupShift(const Reader& r, int64_t line, int64_t first)
      : units(own_units(r)), numbers(own_channels(r) * line), left(units - first % units) {}
  int64_t start(int64_t first) const { return first / units * numbers; }
  // How many numbers further on the planes of the next unit are.
  RIGL_INLINE int64_t next() {
    const bool over = left == 0;
    left = (over ? units : left) - 1;
    return over ? numbers : 0;
  }
};

// ---- y: each entry adds its plane, shifted by its tap, to its unit ------------------------------------------------

template <int U, int LOAD, int STORE, class T>
__attribute__((noinline)) void read_pass(const T* __restrict x, const int32_t* __restrict offsets,
                                         const int32_t* __restrict starts, int64_t units, const T* __restrict values,
                                         const uint16_t* __restrict indices, int64_t load_step, float* __restrict y,
                                         int64_t y_unit, int64_t store_step, bool first, GroupShift shift) {
  constexpr int SUMS = U * STEP<T> / LANES, SETS = SUMS <= 2 ? 4 : SUMS <= 4 ? 2 : 1;
  load_step = LOAD ? LOAD * STEP<T> : load_step;
  store_step = STORE ? STORE * STEP<T> : store_step;
  for (int64_t u = 0; u < units; u++, y += y_unit) {
    const int64_t s = starts[u], n = starts[u + 1] - s;
    x += shift.next();
    if (n == 0 && !first) continue;
    const uint16_t* index = indices + s;
    weighted_sum<U, SETS>(
        values + s, n, [=](int64_t i) { return x + offsets[index[i]]; }, load_step, y, store_step, first);
  }
}

template <int LOAD, int STORE, class... Args>
RIGL_INLINE void read_pixels(int64_t pixels, Args... args) {
  switch (pixels) {
    case 1: return read_pass<1, LOAD, STORE>(args...);
    case 2: return read_pass<2, LOAD, STORE>(args...);
    case 3: return read_pass<3, LOAD, STORE>(args...);
    case 4: return read_pass<4, LOAD, STORE>(args...);
    case 5: return read_pass<5, LOAD, STORE>(args...);
    case 6: return read_pass<6, LOAD, STORE>(args...);
    case 7: return read_pass<7, LOAD, STORE>(args...);
    default: return read_pass<8, LOAD, STORE>(args...);
  }
}

// Output row y, pixels of one span, units u0..u1, of one group of images.
template <class T>
void read(const Reader& r, const T* in, const T* values, Floats out, int64_t group, int64_t y, int64_t span, int64_t u0,
          int64_t u1) {
  constexpr int64_t IMAGES = STEP<T>;
  alignas(64) float buffer[ROW_BUFFER];
  const int64_t x0 = span * span_of(r.phase_x), x1 = least(r.width, x0 + span_of(r.phase_x));
  const int64_t pixels = x1 - x0, line = r.plane_width * IMAGES, unit = pixels * IMAGES;
  const int64_t phases = r.phase_y * r.phase_x;
  const GroupShift shift(r, line, u0);
  const T* row = in + (group * r.plane_height + y / r.phase_y * r.step_y) * r.channels * line + shift.start(u0);
  for (int64_t block = 0, c = 0; c < own_channels(r); block++, c += r.block) {
    const T* planes = row + c * line;
    for (int64_t px = 0; px < r.phase_x && x0 + px < x1; px++) {
      const int64_t phase = y % r.phase_y * r.phase_x + px;
      const int32_t* starts = r.starts + (block * phases + phase) * r.units + u0;
      const int64_t q0 = x0 / r.phase_x, count = (pixels - px + r.phase_x - 1) / r.phase_x;
      const int64_t passes = (count + PIXELS - 1) / PIXELS;
      for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t q = count * pass / passes, n = count * (pass + 1) / passes - q;
        const T* x = planes + (q0 + q) * r.step_x * IMAGES;
        float* to = buffer + (q * r.phase_x + px) * IMAGES;
        const auto go = [&](auto load, auto store) {
          read_pixels<decltype(load)::value, decltype(store)::value>(
              n, x, r.offsets, starts, u1 - u0, values, r.indices, r.step_x * IMAGES, to, unit, r.phase_x * IMAGES,
              block == 0, shift);
        };
        if (r.step_x == 1 && r.phase_x == 1) go(Constant<1>{}, Constant<1>{});
        else if (r.step_x == 2 && r.phase_x == 1) go(Constant<2>{}, Constant<1>{});
        else if (r.step_x == 1 && r.phase_x == 2) go(Constant<1>{}, Constant<2>{});
        else go(Constant<0>{}, Constant<0>{});
      }
    }
  }
  const int64_t image = r.height * r.width * r.units;
  numbers_of(out, group * IMAGES * image + (y * r.width + x0) * r.units + u0, [&](auto* to) {
    for (int64_t x = 0; x < pixels; x++, to += r.units)
      transpose_out(buffer + x * IMAGES, unit, u1 - u0, least(r.batch - group * IMAGES, IMAGES), to, image);
  });
}

// ---- dW: for each entry the dot product of its plane, shifted by its tap, with the plane of its unit --------------

template <int U, int LOAD, class T>
__attribute__((noinline)) void dots_pixels(const T* __restrict x, const int32_t* __restrict offsets,
                                           const int32_t* __restrict starts, int64_t units,
                                           const uint16_t* __restrict indices, int64_t load_step,
                                           const T* __restrict dy, int64_t dy_unit, float* __restrict sums,
                                           GroupShift shift) {
  load_step = LOAD ? LOAD * STEP<T> : load_step;
  const int64_t origin = starts[0];
  for (int64_t u = 0; u < units; u++, dy += dy_unit) {
    int64_t i = starts[u];
    x += shift.next();
    const int64_t end = starts[u + 1];
    if (i == end) continue;
    decltype(load(x)) g[U];
#pragma GCC unroll 8
    for (int k = 0; k < U; k++) g[k] = load(dy + k * STEP<T>);
    for (; i < end; i++) {
      const T* row = x + offsets[indices[i]];
      float* sum = sums + (i - origin) * LANES;
      vec a[2] = {load(sum), zero()};
#pragma GCC unroll 8
      for (int k = 0; k < U; k++) a[k % 2] = multiply_add(a[k % 2], load(row + k * load_step), g[k]);
      store(sum, U > 1 ? a[0] + a[1] : a[0]);
    }
  }
}

template <int LOAD, class... Args>
RIGL_INLINE void dots_any(int64_t pixels, Args... args) {
  switch (pixels) {
    case 1: return dots_pixels<1, LOAD>(args...);
    case 2: return dots_pixels<2, LOAD>(args...);
    case 3: return dots_pixels<3, LOAD>(args...);
    case 4: return dots_pixels<4, LOAD>(args...);
    case 5: return dots_pixels<5, LOAD>(args...);
    case 6: return dots_pixels<6, LOAD>(args...);
    case 7: return dots_pixels<7, LOAD>(args...);
    default: return dots_pixels<8, LOAD>(args...);
  }
}

// dvalues of units u0..u1 in one block of channels. `sums_of` has LANES floats for each of their entries.
template <class T>
void dots_planes(const Reader& r, const T* in, const Planes& g, const T* dy_planes, float* dvalues, int64_t block,
                 int64_t u0, int64_t u1, float* sums_of) {
  constexpr int64_t IMAGES = STEP<T>;
  const int32_t* starts = r.starts + block * r.units + u0;
  const int64_t units = u1 - u0, entries = starts[units] - starts[0];
  const int64_t line = r.plane_width * IMAGES, dy_line = g.padded_width * IMAGES;
  for (int64_t i = 0; i < (entries + SQUARE) * LANES; i++) sums_of[i] = 0;
  const int64_t passes = (r.width + PIXELS - 1) / PIXELS;
  const GroupShift shift(r, line, u0);
  for (int64_t group = 0; group * IMAGES < r.batch; group++)
    for (int64_t y = 0; y < r.height; y++) {
      const T* row = in + ((group * r.plane_height + y * r.step_y) * r.channels + block * r.block) * line;
      row += shift.start(u0);
      const T* dy = dy_planes + ((group * g.padded_height + g.top + y) * g.channels + u0) * dy_line + g.left * IMAGES;
      for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t x = r.width * pass / passes, n = r.width * (pass + 1) / passes - x;
        const T* from = row + x * r.step_x * IMAGES;
        const T* with = dy + x * IMAGES;
        const int64_t step = r.step_x * IMAGES;
        const auto go = [&](auto load) {
          dots_any<decltype(load)::value>(n, from, r.offsets, starts, units, r.indices, step, with, dy_line, sums_of,
                                          shift);
        };
        if (r.step_x == 1) go(Constant<1>{});
        else if (r.step_x == 2) go(Constant<2>{});
        else go(Constant<0>{});
      }
    }
  float* to = dvalues + starts[0];
  for (int64_t i = 0; i < entries; i += SQUARE) {
    square_vec v[SQUARE];
    for (int k = 0; k < SQUARE; k++) v[k] = fold(load(sums_of + (i + k) * LANES));
    const square_vec s = sums(v);
    for (int64_t k = 0; k < least(SQUARE, entries - i); k++) to[i + k] = s[k];
  }
}

}  // namespace
