// XLA FFI handlers of convolutions. Shapes are checked, and the geometry worked out, by the Python side.
#include "handlers.h"

namespace {

using Sizes = ffi::Span<const int64_t>;

// What the Python side sends: see Taps in conv.py. Row ky of the kernel reads plane row step * (y / phase) + rows[ky],
// for output rows y with y % phase == row_phases[ky]; columns likewise.
struct Taps {
  Sizes rows, columns, row_phases, column_phases;
  int64_t count() const { return rows.size() * columns.size(); }
};

const int32_t* offset_table(const Taps& taps, const Reader& r, int64_t lanes) {
  int32_t* offsets = scratch<int32_t, 1>(r.block * taps.count());
  int32_t* next = offsets;
  for (int64_t c = 0; c < r.block; c++)
    for (int64_t row : taps.rows)
      for (int64_t column : taps.columns)
        *next++ = (int32_t)(((row * r.channels + c) * r.plane_width + column) * lanes);
  return offsets;
}

// Sizes in the order of the fields of Reader from `batch` on.
Reader reader(const U16& indices, const S32& starts, const float* values, const Sizes& n) {
  return {indices.typed_data(), starts.typed_data(), values, nullptr, n[0], n[1], n[2],  n[3],
          n[4],                 n[5],                n[6],   n[7],    n[8], n[9], n[10], n[11]};
}

Planes planes_of(const Sizes& n) { return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7]}; }

int64_t groups_of(int64_t batch, int64_t lanes) { return (batch + lanes - 1) / lanes; }

ffi::Error MakePlanes(ffi::ThreadPool pool, F32 x, F32Result out, Sizes sizes, int64_t asked) {
  const Kernels* k = level(asked);
  if (!k) return kNoLevel;
  const Planes p = planes_of(sizes);
  const int64_t tasks = groups_of(p.batch, k->lanes) * p.padded_height;
  parallel(pool, tasks, x.element_count(), [&](int64_t task) {
    k->planes(p, x.typed_data(), out->typed_data(), task / p.padded_height, task % p.padded_height);
  });
  return ffi::Error::Success();
}

void read(ffi::ThreadPool& pool, const Kernels& k, const Reader& r, const float* planes, float* out, int64_t entries) {
  const int64_t span = span_of(r.phase_x), spans = (r.width + span - 1) / span, groups = groups_of(r.batch, k.lanes);
  const int64_t most = std::max<int64_t>(1, ROW_BUFFER / (std::min(span, r.width) * k.lanes));
  const int64_t chunk = std::min(most, r.units), chunks = (r.units + chunk - 1) / chunk;
  const int64_t rows = chunks * spans, work = r.batch * r.height * r.width * entries / (r.phase_y * r.phase_x);
  parallel(pool, groups * r.height * rows, work, [&](int64_t task) {
    const int64_t u0 = task % chunks * chunk, row = task / rows;
    k.read(r, planes, out, row / r.height, row % r.height, task / chunks % spans, u0, std::min(r.units, u0 + chunk));
  });
}

ffi::Error Forward(ffi::ThreadPool pool, F32 planes, F32 values, U16 indices, S32 starts, F32Result y, Sizes sizes,
                   Sizes rows, Sizes columns, int64_t asked) {
  const Kernels* k = level(asked);
  if (!k) return kNoLevel;
  Reader r = reader(indices, starts, values.typed_data(), sizes);
  r.offsets = offset_table({rows, columns, {}, {}}, r, k->lanes);
  read(pool, *k, r, planes.typed_data(), y->typed_data(), indices.element_count());
  return ffi::Error::Success();
}

// The entries of each block sorted by (phase of their tap, unit) instead of by unit. Rewrites the pattern of r.
void split_phases(ffi::ThreadPool& pool, Reader& r, const Taps& taps, int64_t entries) {
  const int64_t phases = r.phase_y * r.phase_x, blocks = (r.channels + r.block - 1) / r.block;
  uint16_t* indices = scratch<uint16_t, 2>(entries);
  int32_t* starts = scratch<int32_t, 3>(blocks * phases * r.units + 1);
  float* values = scratch<float, 4>(entries);
  int64_t* phase_of = scratch<int64_t, 5>(r.block * taps.count());
  for (int64_t i = 0; i < r.block * taps.count(); i++) {
    const int64_t tap = i % taps.count();
    phase_of[i] = taps.row_phases.begin()[tap / taps.columns.size()] * r.phase_x +
                  taps.column_phases.begin()[tap % taps.columns.size()];
  }
  parallel(pool, blocks, entries * 8, [&](int64_t block) {
    const int32_t* from = r.starts + block * r.units;
    int32_t* to = starts + block * phases * r.units;
    int64_t next = from[0];
    for (int64_t phase = 0; phase < phases; phase++)
      for (int64_t u = 0; u < r.units; u++) {
        to[phase * r.units + u] = (int32_t)next;
        for (int64_t i = from[u]; i < from[u + 1]; i++)
          if (phase_of[r.indices[i]] == phase) indices[next] = r.indices[i], values[next++] = r.values[i];
      }
  });
  starts[blocks * phases * r.units] = (int32_t)entries;
  r.indices = indices, r.starts = starts, r.values = values;
}

ffi::Error InputGradient(ffi::ThreadPool pool, F32 planes, F32 values, S32 order, U16 indices, S32 starts,
                         F32Result dx, Sizes sizes, Sizes rows, Sizes columns, Sizes row_phases, Sizes column_phases,
                         int64_t asked) {
  const Kernels* k = level(asked);
  if (!k) return kNoLevel;
  Reader r = reader(indices, starts, ordered(pool, values.typed_data(), order), sizes);
  const Taps taps{rows, columns, row_phases, column_phases};
  const int64_t entries = order.element_count();
  if (r.phase_y * r.phase_x > 1) split_phases(pool, r, taps, entries);
  r.offsets = offset_table(taps, r, k->lanes);
  read(pool, *k, r, planes.typed_data(), dx->typed_data(), entries);
  return ffi::Error::Success();
}

ffi::Error ValuesGradient(ffi::ThreadPool pool, F32 planes, F32 dy_planes, U16 indices, S32 starts, F32Result dvalues,
                          Sizes sizes, Sizes dy_sizes, Sizes rows, Sizes columns, int64_t asked) {
  const Kernels* k = level(asked);
  if (!k) return kNoLevel;
  Reader r = reader(indices, starts, nullptr, sizes);
  r.offsets = offset_table({rows, columns, {}, {}}, r, k->lanes);
  const Planes g = planes_of(dy_sizes);
  const int64_t blocks = (r.channels + r.block - 1) / r.block, entries = indices.element_count();
  // Sums of about 1024 entries stay in a cache near by; and there is work for every thread.
  const int64_t parts = std::max<int64_t>(entries / blocks / 1024 + 1, (4 * pool.num_threads() + blocks - 1) / blocks);
  const int64_t chunk = std::max<int64_t>(1, r.units / parts), chunks = (r.units + chunk - 1) / chunk;
  parallel(pool, blocks * chunks, r.batch * r.height * r.width * entries, [&](int64_t task) {
    const int64_t block = task / chunks, u0 = task % chunks * chunk, u1 = std::min(r.units, u0 + chunk);
    const int64_t own = r.starts[block * r.units + u1] - r.starts[block * r.units + u0];
    k->dots_planes(r, planes.typed_data(), g, dy_planes.typed_data(), dvalues->typed_data(), block, u0, u1,
                   scratch<float, 6>((own + 8) * k->lanes));
  });
  return ffi::Error::Success();
}

}  // namespace

// clang-format off
#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_planes, MakePlanes, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<F32>().Ret<F32>()
    .Attr<Sizes>("sizes").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_conv_forward, Forward, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<F32>().Arg<F32>().Arg<U16>().Arg<S32>().Ret<F32>()
    .Attr<Sizes>("sizes").Attr<Sizes>("rows").Attr<Sizes>("columns").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_conv_input_gradient, InputGradient, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<F32>().Arg<F32>().Arg<S32>().Arg<U16>().Arg<S32>().Ret<F32>()
    .Attr<Sizes>("sizes").Attr<Sizes>("rows").Attr<Sizes>("columns")
    .Attr<Sizes>("row_phases").Attr<Sizes>("column_phases").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_conv_values_gradient, ValuesGradient, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<F32>().Arg<F32>().Arg<U16>().Arg<S32>().Ret<F32>()
    .Attr<Sizes>("sizes").Attr<Sizes>("dy_sizes").Attr<Sizes>("rows").Attr<Sizes>("columns").Attr<int64_t>("level"));
#pragma GCC visibility pop
