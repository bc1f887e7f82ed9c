// XLA FFI handlers between the values of a pattern and the dense weight. They move numbers of any type as they are.
#include <cstring>

#include "handlers.h"

namespace {

constexpr int64_t kStrip = 1 << 20;  // bytes

// A dense weight [depth, taps, channels, outputs], whose pattern counts rows as (depth, channel, tap).
struct Weight {
  int64_t rows, depth, taps, outputs, height, block, units;
  const uint16_t* indices;
  const int32_t* starts;

  int64_t blocks() const { return (rows + block - 1) / block; }
  int64_t dense_row(int64_t row) const {
    if (taps == 1) return row;
    const int64_t slice = rows / depth, in = row % slice;
    return row - in + in % taps * (slice / taps) + in / taps;
  }
};

ffi::Error make_weight(const U16& indices, const S32& starts, int64_t values, int64_t size, int64_t rows, int64_t depth,
                       int64_t taps, int64_t outputs, int64_t height, int64_t block, Weight& w) {
  if (height < 1 || height > 16) return invalid("height");
  if (block < 1 || block > 1 << 16) return invalid("block");
  if (rows < 0 || rows > kMost || depth < 1 || taps < 1 || rows % times({depth, taps}) || outputs < 0 || outputs > kMost || outputs % height ||
      size != times({rows, outputs}))
    return invalid("size of the weight");
  w = {rows, depth, taps, outputs, height, block, outputs / height, indices.typed_data(), starts.typed_data()};
  return check_arrays(indices, starts, values, w.blocks(), w.units, height);
}

// A part of the weight: some rows of one block, columns of units u0 to u1 side by side.
struct Strip {
  int64_t first, rows, u0, u1;
  const int32_t* starts;  // of the segments of u0 and on
};

// f(strip, after a check of its segments), for strips as wide as a page of memory, or narrower ones that fit into the
// L2 cache, on all threads.
template <typename F>
ffi::Error each_strip(ffi::ThreadPool& pool, const Weight& w, int64_t entries, int64_t size, int64_t work, const F& f) {
  const int64_t most = std::min<int64_t>(4096, kStrip / std::max<int64_t>(1, std::min(w.block, w.rows)));
  const int64_t width = std::max<int64_t>(1, most / (size * w.height)), strips = (w.units + width - 1) / width;
  std::atomic<bool> sound{true};
  parallel(pool, w.blocks() * strips, work * MOVE, [&](int64_t task) {
    const int64_t block = task / strips, first = block * w.block, u0 = task % strips * width;
    const Strip strip{first, std::min(w.block, w.rows - first), u0, std::min(w.units, u0 + width),
                      w.starts + block * w.units + u0};
    if (level(-1)->sound(w.indices, strip.starts, strip.u1 - u0, entries, strip.rows))
      f(strip);
    else
      sound = false;
  });
  return sound ? ffi::Error::Success() : indices_invalid();
}

// f(number of an entry, its row in the strip, its first column in the strip), for every entry of a strip.
template <typename F>
void each_entry(const Weight& w, const Strip& s, const F& f) {
  for (int64_t u = s.u0; u < s.u1; u++)
    for (int64_t i = s.starts[u - s.u0]; i < s.starts[u - s.u0 + 1]; i++) f(i, w.indices[i], (u - s.u0) * w.height);
}

// Whether fewer than one in sixteen units is an entry: then a strip is not worth a copy of its own.
bool few(const Weight& w, int64_t entries) { return entries * 16 < w.rows * w.units; }

// Moves each number by itself: f(place among the values, place in the dense weight).
template <typename F>
ffi::Error each_number(ffi::ThreadPool& pool, const Weight& w, int64_t entries, int64_t size, const F& f) {
  return each_strip(pool, w, entries, size, entries * w.height, [&](const Strip& s) {
    each_entry(w, s, [&](int64_t i, int64_t row, int64_t column) {
      const int64_t at = w.dense_row(s.first + row) * w.outputs + s.u0 * w.height + column;
      for (int64_t r = 0; r < w.height; r++) f(i * w.height + r, at + r);
    });
  });
}

// Numbers of a column of the weight lie in a line of the cache each, so they are moved within a copy of the strip.
template <typename T>
ffi::Error fill(ffi::ThreadPool& pool, const Weight& w, int64_t entries, const T* values, T* dense) {
  if (few(w, entries)) {
    const int64_t size = w.rows * w.outputs, part = 1 << 16;
    parallel(pool, (size + part - 1) / part, size, [&](int64_t task) {
      std::memset(dense + task * part, 0, std::min(part, size - task * part) * sizeof(T));
    });
    return each_number(pool, w, entries, sizeof(T), [=](int64_t i, int64_t at) { dense[at] = values[i]; });
  }
  return each_strip(pool, w, entries, sizeof(T), w.rows * w.outputs, [&](const Strip& s) {
    const int64_t h = w.height, columns = (s.u1 - s.u0) * h;
    T* own = scratch<T, 6>(s.rows * columns);
    std::memset(own, 0, s.rows * columns * sizeof(T));
    each_entry(w, s, [=](int64_t i, int64_t row, int64_t column) {
      for (int64_t r = 0; r < h; r++) own[row * columns + column + r] = values[i * h + r];
    });
    for (int64_t row = 0; row < s.rows; row++)
      std::memcpy(dense + w.dense_row(s.first + row) * w.outputs + s.u0 * h, own + row * columns, columns * sizeof(T));
  });
}

template <typename T>
ffi::Error take(ffi::ThreadPool& pool, const Weight& w, int64_t entries, const T* dense, T* values) {
  const int64_t h = w.height, used = w.starts[w.blocks() * w.units] * h;
  std::memset(values + used, 0, (entries * h - used) * sizeof(T));
  if (few(w, entries))
    return each_number(pool, w, entries, sizeof(T), [=](int64_t i, int64_t at) { values[i] = dense[at]; });
  return each_strip(pool, w, entries, sizeof(T), w.rows * w.outputs, [&](const Strip& s) {
    const int64_t columns = (s.u1 - s.u0) * h;
    T* own = scratch<T, 6>(s.rows * columns);
    for (int64_t row = 0; row < s.rows; row++)
      std::memcpy(own + row * columns, dense + w.dense_row(s.first + row) * w.outputs + s.u0 * h, columns * sizeof(T));
    each_entry(w, s, [=](int64_t i, int64_t row, int64_t column) {
      for (int64_t r = 0; r < h; r++) values[i * h + r] = own[row * columns + column + r];
    });
  });
}

// f(pointer of an unsigned type of that size) for 1, 2 and 4 bytes.
template <typename F>
ffi::Error sized(ffi::DataType type, const F& f) {
  switch (ffi::ByteWidth(type)) {
    case 1: return f((uint8_t*)nullptr);
    case 2: return f((uint16_t*)nullptr);
    case 4: return f((uint32_t*)nullptr);
    default: return invalid("type of the values");
  }
}

ffi::Error Fill(ffi::ThreadPool pool, ffi::AnyBuffer values, U16 indices, S32 starts, ffi::Result<ffi::AnyBuffer> dense,
                int64_t rows, int64_t depth, int64_t taps, int64_t outputs, int64_t height, int64_t block) {
  Weight w;
  if (auto e = make_weight(indices, starts, values.element_count(), dense->element_count(), rows, depth, taps, outputs,
                           height, block, w);
      e.failure())
    return e;
  if (values.element_type() != dense->element_type()) return invalid("type of the weight");
  return sized(values.element_type(), [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    return fill(pool, w, indices.element_count(), (const T*)values.untyped_data(), (T*)dense->untyped_data());
  });
}

ffi::Error Take(ffi::ThreadPool pool, ffi::AnyBuffer dense, U16 indices, S32 starts, ffi::Result<ffi::AnyBuffer> values,
                int64_t rows, int64_t depth, int64_t taps, int64_t outputs, int64_t height, int64_t block) {
  Weight w;
  if (auto e = make_weight(indices, starts, values->element_count(), dense.element_count(), rows, depth, taps, outputs,
                           height, block, w);
      e.failure())
    return e;
  if (values->element_type() != dense.element_type()) return invalid("type of the weight");
  return sized(dense.element_type(), [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    return take(pool, w, indices.element_count(), (const T*)dense.untyped_data(), (T*)values->untyped_data());
  });
}

}  // namespace

// clang-format off
#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_fill, Fill, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<ffi::AnyBuffer>().Arg<U16>().Arg<S32>().Ret<ffi::AnyBuffer>()
    .Attr<int64_t>("rows").Attr<int64_t>("depth").Attr<int64_t>("taps").Attr<int64_t>("outputs").Attr<int64_t>("height").Attr<int64_t>("block"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_take, Take, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<ffi::AnyBuffer>().Arg<U16>().Arg<S32>().Ret<ffi::AnyBuffer>()
    .Attr<int64_t>("rows").Attr<int64_t>("depth").Attr<int64_t>("taps").Attr<int64_t>("outputs").Attr<int64_t>("height").Attr<int64_t>("block"));
#pragma GCC visibility pop
