// XLA FFI handlers of convolutions. planes.py computes the geometry; here it is checked.
#include <utility>

#include "handlers.h"

namespace {

using Sizes = ffi::Span<const int64_t>;

// What differs between products in float32 and in bfloat16.
struct Singles {
  using Number = float;  // of planes and of values
  using Numbers = F32;
  using Values = F32;
  static const Kernels* kernels(int64_t asked) { return level(asked); }
  static bool reads(ffi::DataType type) { return is_floats(type); }
};

struct Halves {
  using Number = uint16_t;
  using Numbers = U16;
  using Values = ffi::Buffer<ffi::BF16>;
  static const HalfKernels* kernels(int64_t asked) { return half_level(asked); }
  static bool reads(ffi::DataType type) { return type == ffi::DataType::BF16; }
};

template <class Of, class Buffer>
const typename Of::Number* numbers(const Buffer& x) {
  return (const typename Of::Number*)x.untyped_data();
}

// The taps of the kernel; see _Margins in planes.py. Row ky of the kernel reads plane row step * (y / phase) + rows[ky]
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

// Whether all sizes are in [low, high].
bool all_in(const Sizes& sizes, int64_t low, int64_t high) {
  return std::all_of(sizes.begin(), sizes.end(), [=](int64_t n) { return low <= n && n <= high; });
}

// Sizes in the order of the fields of Reader from `batch` on.
Reader reader(const U16& indices, const S32& starts, const Sizes& n) {
  return {indices.typed_data(), starts.typed_data(), nullptr, n[0], n[1], n[2],  n[3],  n[4],
          n[5],                 n[6],                n[7],    n[8], n[9], n[10], n[11], n[12]};
}

Planes planes_of(const Sizes& n) { return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7]}; }

int64_t groups_of(int64_t batch, int64_t lanes) { return (batch + lanes - 1) / lanes; }

// Of the channels of one group.
int64_t blocks_of(const Reader& r) { return (own_channels(r) + r.block - 1) / r.block; }

// Whether every tap, from the first to the last of `outputs` pixels, stays within `size` rows (or columns) of a plane.
bool within(const Sizes& taps, int64_t outputs, int64_t phase, int64_t step, int64_t size) {
  const int64_t last = outputs > 0 ? times({(outputs - 1) / phase, step}) : 0;
  return taps.size() > 0 && last < size && all_in(taps, 0, size - last - 1);
}

// Whether there is a phase below `count` for each tap; a product without phases has a count of 1.
bool phases_sound(const Sizes& phases, const Sizes& taps, int64_t count) {
  return phases.size() == 0 ? count == 1 : phases.size() == taps.size() && all_in(phases, 0, count - 1);
}

// How many numbers are in all planes.
template <class K>
int64_t room_of(const K& k, int64_t batch, int64_t height, int64_t channels, int64_t width) {
  return times({groups_of(batch, k.lanes), height, channels, width, k.lanes});
}

// Whether these are the sizes of a Reader, and the groups have equal parts of its channels and units.
bool sizes_sound(const Sizes& sizes) {
  if (sizes.size() != 13 || !all_in(sizes, 0, kMost)) return false;
  const int64_t channels = sizes[3], block = sizes[4], units = sizes[7], groups = sizes[12];
  return std::min({channels, block, units, sizes[8], sizes[9], sizes[10], sizes[11], groups}) > 0 && channels % groups == 0 &&
         units % groups == 0;
}

// Checks every index of a convolution, and every size but what `sizes_sound` does. `values` is the number of values of
// its kernel, `images` how many numbers are in the other images, which it writes or multiplies with.
template <class K, class Buffer>
ffi::Error check(const K& k, const Buffer& planes, const U16& indices, const S32& starts, const Reader& r,
                 const Taps& taps, int64_t values, int64_t images) {
  if ((int64_t)planes.element_count() < room_of(k, r.batch, r.plane_height, r.channels, r.plane_width))
    return invalid("size of the planes");
  if (images != times({r.batch, r.height, r.width, r.units})) return invalid("size of the images");
  if (!within(taps.rows, r.height, r.phase_y, r.step_y, r.plane_height)) return invalid("rows of the taps");
  if (!within(taps.columns, r.width, r.phase_x, r.step_x, r.plane_width)) return invalid("columns of the taps");
  if (!phases_sound(taps.row_phases, taps.rows, r.phase_y) || !phases_sound(taps.column_phases, taps.columns, r.phase_x))
    return invalid("phases of the taps");
  if (times({r.plane_height, r.channels, r.plane_width, k.lanes}) > kMost) return invalid("images of over 2^31 numbers");
  if (std::min(span_of(r.phase_x), r.width) * k.lanes > ROW_BUFFER) return invalid("stride");
  if (times({r.block, taps.count()}) > 1 << 16) return invalid("block");
  if (auto e = check_arrays(indices, starts, values, blocks_of(r), r.units, 1); e.failure()) return e;
  for (int64_t block = 0; block < blocks_of(r); block++) {
    const int64_t bound = std::min(r.block, own_channels(r) - block * r.block) * taps.count();
    if (!k.sound(r.indices, r.starts + block * r.units, r.units, indices.element_count(), bound))
      return indices_invalid();
  }
  return ffi::Error::Success();
}

template <class Of>
ffi::Error MakePlanes(ffi::ThreadPool pool, Activations x, ffi::Result<typename Of::Numbers> out, Sizes sizes,
                      int64_t asked) {
  const auto* k = Of::kernels(asked);
  if (!k) return kNoLevel;
  if (!Of::reads(x.element_type())) return invalid("type of the images");
  if (sizes.size() != 8 || !all_in(sizes, 0, kMost)) return invalid("sizes of the planes");
  const Planes p = planes_of(sizes);
  if ((int64_t)x.element_count() != times({p.batch, p.height, p.width, p.channels}) ||
      (int64_t)out->element_count() < room_of(*k, p.batch, p.padded_height, p.channels, p.padded_width))
    return invalid("sizes of the planes");
  const int64_t tasks = groups_of(p.batch, k->lanes) * p.padded_height;
  parallel(pool, tasks, x.element_count() * MOVE, [&](int64_t task) {
    k->planes(p, floats(x), out->typed_data(), task / p.padded_height, task % p.padded_height);
  });
  return ffi::Error::Success();
}

template <class K, class T>
void read(ffi::ThreadPool& pool, const K& k, const Reader& r, const T* planes, const T* values, Floats out,
          int64_t entries) {
  const int64_t span = span_of(r.phase_x), spans = (r.width + span - 1) / span, groups = groups_of(r.batch, k.lanes);
  const int64_t most = std::max<int64_t>(1, ROW_BUFFER / std::max<int64_t>(1, std::min(span, r.width) * k.lanes));
  const int64_t chunk = std::min(most, r.units), chunks = (r.units + chunk - 1) / chunk;
  const int64_t rows = chunks * spans, work = r.batch * r.height * r.width * entries / (r.phase_y * r.phase_x);
  parallel(pool, groups * r.height * rows, work, [&](int64_t task) {
    const int64_t u0 = task % chunks * chunk, row = task / rows;
    k.read(r, planes, values, out, row / r.height, row % r.height, task / chunks % spans, u0,
           std::min(r.units, u0 + chunk));
  });
}

template <class Of>
ffi::Error Forward(ffi::ThreadPool pool, typename Of::Numbers planes, typename Of::Values values, U16 indices,
                   S32 starts, ActivationsResult y, Sizes sizes, Sizes rows, Sizes columns, int64_t asked) {
  const auto* k = Of::kernels(asked);
  if (!k) return kNoLevel;
  if (!is_floats(y->element_type())) return invalid("type of the result");
  if (!sizes_sound(sizes)) return invalid("sizes of the convolution");
  const Taps taps{rows, columns, {}, {}};
  const int64_t given = values.element_count(), images = y->element_count();
  Reader r = reader(indices, starts, sizes);
  if (auto e = check(*k, planes, indices, starts, r, taps, given, images); e.failure()) return e;
  r.offsets = offset_table(taps, r, k->lanes);
  read(pool, *k, r, numbers<Of>(planes), numbers<Of>(values), floats(*y), indices.element_count());
  return ffi::Error::Success();
}

// Sorts the entries of a transposed pattern by (block, phase of their tap, group of their channel, unit) instead of by
// (block, unit), replaces the pattern of r, and returns its values. Its channels are outputs of the convolution; with groups, a block is then
// one of the channels of a group. The pattern has been checked, so every index is one of a channel and a tap.
template <class T>
const T* split(ffi::ThreadPool& pool, Reader& r, const T* given, const Taps& taps, int64_t groups, int64_t entries) {
  const int64_t phases = r.phase_y * r.phase_x, from_blocks = blocks_of(r), own = r.channels / groups;
  const int64_t block_size = std::min(r.block, own), blocks = (own + block_size - 1) / block_size;
  const int64_t all_units = r.units * groups, count = taps.count();
  struct Place {
    int64_t segment;  // of unit 0
    uint16_t index;
  };
  uint16_t* indices = scratch<uint16_t, 2>(entries);
  int32_t* starts = scratch<int32_t, 3>(blocks * phases * all_units + 1);
  T* values = scratch<T, 4>(entries);
  int64_t* phase_of = scratch<int64_t, 5>(count);
  std::fill(phase_of, phase_of + count, 0);
  for (int64_t tap = 0; tap < count && phases > 1; tap++)
    phase_of[tap] = taps.row_phases.begin()[tap / taps.columns.size()] * r.phase_x +
                    taps.column_phases.begin()[tap % taps.columns.size()];
  // One group: each block is sorted by itself. Several: their channels may lie in any blocks, so one task sorts all.
  const int64_t tasks = groups == 1 ? from_blocks : 1, segments = blocks * phases * all_units / tasks;
  parallel(pool, tasks, entries * 8, [&](int64_t task) {
    const int64_t first = groups == 1 ? task : 0, last = groups == 1 ? task + 1 : from_blocks;
    int32_t* ends = starts + 1 + task * segments;  // counts at first, then where segments start, at last where they end
    Place* places = scratch<Place, 7>(r.block * count);
    const auto each = [&](const auto& visit) {
      for (int64_t block = first; block < last; block++) {
        for (int64_t c = 0; c < std::min(r.block, r.channels - block * r.block); c++) {
          const int64_t channel = block * r.block + c, group = channel / own, inside = channel % own;
          const int64_t part = inside / block_size * phases, start = inside % block_size * count;
          for (int64_t tap = 0; tap < count; tap++)
            places[c * count + tap] = {(part + phase_of[tap]) * all_units + group * r.units, (uint16_t)(start + tap)};
        }
        for (int64_t u = 0; u < r.units; u++)
          for (int64_t i = r.starts[block * r.units + u]; i < r.starts[block * r.units + u + 1]; i++) {
            const Place& place = places[r.indices[i]];
            visit(ends[place.segment + u - task * segments], place.index, given[i]);
          }
      }
    };
    std::fill(ends, ends + segments, 0);
    each([](int32_t& n, uint16_t, T) { n++; });
    int32_t next = r.starts[first * r.units];
    for (int64_t s = 0; s < segments; s++) next += std::exchange(ends[s], next);
    each([&](int32_t& at, uint16_t index, T value) { indices[at] = index, values[at++] = value; });
  });
  starts[0] = 0;
  r.indices = indices, r.starts = starts;
  r.block = block_size, r.units = all_units, r.groups = groups;
  return values;
}

template <class Of>
ffi::Error InputGradient(ffi::ThreadPool pool, typename Of::Numbers planes, typename Of::Values values, S32 order,
                         U16 indices, S32 starts, ActivationsResult dx, Sizes sizes, Sizes rows, Sizes columns,
                         Sizes row_phases, Sizes column_phases, int64_t asked) {
  const auto* k = Of::kernels(asked);
  if (!k) return kNoLevel;
  if (!is_floats(dx->element_type())) return invalid("type of the result");
  if (!sizes_sound(sizes)) return invalid("sizes of the convolution");
  const Taps taps{rows, columns, row_phases, column_phases};
  const int64_t entries = order.element_count(), images = dx->element_count();
  Reader r = reader(indices, starts, sizes);
  const int64_t groups = r.groups, all_units = r.units;
  r.groups = 1, r.units /= groups;  // as the transposed pattern counts: it has the outputs of all groups as channels
  if (images != times({r.batch, r.height, r.width, all_units})) return invalid("size of the images");
  if (auto e = check(*k, planes, indices, starts, r, taps, entries, images / groups); e.failure()) return e;
  if (values.element_count() > kMost) return invalid("number of values");
  const auto* v = ordered(pool, *k, numbers<Of>(values), values.element_count(), order);
  if (!v) return indices_invalid();
  if (times({blocks_of(r), r.phase_y, r.phase_x, all_units}) > kMost) return invalid("stride");
  if (r.phase_y * r.phase_x * groups > 1) v = split(pool, r, v, taps, groups, entries);
  r.offsets = offset_table(taps, r, k->lanes);
  read(pool, *k, r, numbers<Of>(planes), v, floats(*dx), entries);
  return ffi::Error::Success();
}

template <class Of>
ffi::Error ValuesGradient(ffi::ThreadPool pool, typename Of::Numbers planes, typename Of::Numbers dy_planes,
                          U16 indices, S32 starts, F32Result dvalues, Sizes sizes, Sizes dy_sizes, Sizes rows,
                          Sizes columns, int64_t asked) {
  const auto* k = Of::kernels(asked);
  if (!k) return kNoLevel;
  if (!sizes_sound(sizes)) return invalid("sizes of the convolution");
  const Taps taps{rows, columns, {}, {}};
  const int64_t entries = indices.element_count(), given = dvalues->element_count();
  if (dy_sizes.size() != 8 || !all_in(dy_sizes, 0, kMost)) return invalid("sizes of the planes");
  const Planes g = planes_of(dy_sizes);
  const int64_t images = times({g.batch, g.height, g.width, g.channels});
  Reader r = reader(indices, starts, sizes);
  if (auto e = check(*k, planes, indices, starts, r, taps, given, images); e.failure()) return e;
  if (g.batch != r.batch || g.height != r.height || g.width != r.width || g.channels != r.units ||
      g.top + g.height > g.padded_height || g.left + g.width > g.padded_width ||
      (int64_t)dy_planes.element_count() < room_of(*k, g.batch, g.padded_height, g.channels, g.padded_width))
    return invalid("sizes of the planes");
  clear_padding(dvalues, starts, 1);
  r.offsets = offset_table(taps, r, k->lanes);
  const int64_t blocks = blocks_of(r);
  // The sums of about 1024 entries stay in the L2 cache, and there are tasks for every thread.
  const int64_t parts = std::max<int64_t>(entries / blocks / 1024 + 1, (4 * pool.num_threads() + blocks - 1) / blocks);
  const int64_t chunk = std::max<int64_t>(1, r.units / parts), chunks = (r.units + chunk - 1) / chunk;
  parallel(pool, blocks * chunks, r.batch * r.height * r.width * entries, [&](int64_t task) {
    const int64_t block = task / chunks, u0 = task % chunks * chunk, u1 = std::min(r.units, u0 + chunk);
    const int64_t own = r.starts[block * r.units + u1] - r.starts[block * r.units + u0];
    k->dots_planes(r, numbers<Of>(planes), g, numbers<Of>(dy_planes), dvalues->typed_data(), block, u0, u1,
                   scratch<float, 6>((own + 8) * k->lanes));
  });
  return ffi::Error::Success();
}

}  // namespace

// clang-format off
#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_planes, MakePlanes<Singles>, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<Activations>().Ret<F32>()
    .Attr<Sizes>("sizes").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_conv_forward, Forward<Singles>, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<F32>().Arg<F32>().Arg<U16>().Arg<S32>().Ret<Activations>()
    .Attr<Sizes>("sizes").Attr<Sizes>("rows").Attr<Sizes>("columns").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_conv_input_gradient, InputGradient<Singles>, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<F32>().Arg<F32>().Arg<S32>().Arg<U16>().Arg<S32>().Ret<Activations>()
    .Attr<Sizes>("sizes").Attr<Sizes>("rows").Attr<Sizes>("columns")
    .Attr<Sizes>("row_phases").Attr<Sizes>("column_phases").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_conv_values_gradient, ValuesGradient<Singles>, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<F32>().Arg<F32>().Arg<U16>().Arg<S32>().Ret<F32>()
    .Attr<Sizes>("sizes").Attr<Sizes>("dy_sizes").Attr<Sizes>("rows").Attr<Sizes>("columns").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_half_planes, MakePlanes<Halves>, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<Activations>().Ret<U16>()
    .Attr<Sizes>("sizes").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_half_conv_forward, Forward<Halves>, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<U16>().Arg<Halves::Values>().Arg<U16>().Arg<S32>().Ret<Activations>()
    .Attr<Sizes>("sizes").Attr<Sizes>("rows").Attr<Sizes>("columns").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_half_conv_input_gradient, InputGradient<Halves>, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<U16>().Arg<Halves::Values>().Arg<S32>().Arg<U16>().Arg<S32>().Ret<Activations>()
    .Attr<Sizes>("sizes").Attr<Sizes>("rows").Attr<Sizes>("columns")
    .Attr<Sizes>("row_phases").Attr<Sizes>("column_phases").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_half_conv_values_gradient, ValuesGradient<Halves>, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<U16>().Arg<U16>().Arg<U16>().Arg<S32>().Ret<F32>()
    .Attr<Sizes>("sizes").Attr<Sizes>("dy_sizes").Attr<Sizes>("rows").Attr<Sizes>("columns").Attr<int64_t>("level"));
#pragma GCC visibility pop
