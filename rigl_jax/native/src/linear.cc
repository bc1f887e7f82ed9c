// XLA FFI handlers of the sparse matrix products. Sizes come from linear.py and are checked here.
#include "handlers.h"

namespace {

int64_t block_count(const Pattern& p) { return (p.rows + p.block - 1) / p.block; }

// The pattern of a matrix [rows, outputs], after a check that its sizes fit its arrays.
ffi::Error make_pattern(const U16& indices, const S32& starts, int64_t values, int64_t rows, int64_t outputs,
                        int64_t height, int64_t block, Pattern& p) {
  if (height != 1 && height != 4 && height != 8 && height != 16) return invalid("height");
  if (block < 1 || block > (height > 1 ? (int64_t)RUN_BLOCK : 1 << 16)) return invalid("block");
  if (rows < 0 || rows > kMost || outputs < 0 || outputs > kMost || outputs % height) return invalid("size of the weight");
  const int64_t entries = indices.element_count();
  p = {indices.typed_data(), starts.typed_data(), entries, rows, outputs / height, height, block};
  return check_arrays(indices, starts, values, block_count(p), p.units, height);
}

bool holds_tiles(const F32& tiles, int64_t batch, int64_t features, const Kernels& k) {
  return (int64_t)tiles.element_count() >= times({tiled_batch(batch, k.lanes), features});
}

ffi::Error tiles_invalid() { return invalid("size of the activations"); }

// Runs f(0) ... f(count - 1), each of which returns whether its part of the pattern is valid.
template <typename F>
ffi::Error checked(ffi::ThreadPool& pool, int64_t count, int64_t operations, const F& f) {
  std::atomic<bool> sound{true};
  parallel(pool, count, operations, [&](int64_t task) {
    if (!f(task)) sound = false;
  });
  return sound ? ffi::Error::Success() : indices_invalid();
}

// Units of a task: as many as fit into its buffer, fewer if threads would be idle.
int64_t chunk_of(const Pattern& p, int64_t others, int64_t threads) {
  const int64_t most = CHUNK / p.height;
  const int64_t fair = (p.units * others + 3 * threads - 1) / (3 * threads);
  const int64_t line = std::max<int64_t>(1, 16 / p.height);  // whole cache lines of the output
  return std::clamp((fair + line - 1) / line * line, line, most);
}

// f(other, u0, u1) for chunks of the units, each for `others` parts: tiles, or blocks of rows.
template <typename F>
ffi::Error by_chunks(ffi::ThreadPool& pool, const Pattern& p, int64_t others, int64_t operations, const F& f) {
  const int64_t chunk = chunk_of(p, others, pool.num_threads()), chunks = (p.units + chunk - 1) / chunk;
  return checked(pool, others * chunks, operations, [&](int64_t task) {
    const int64_t u0 = task % chunks * chunk;
    return f(task / chunks, u0, std::min(p.units, u0 + chunk));
  });
}

// f(slice, block) for slices of so many batch rows and blocks of rows of the weight.
template <typename F>
ffi::Error by_slices(ffi::ThreadPool& pool, const Pattern& p, int64_t batch, int64_t slice, const F& f) {
  const int64_t blocks = block_count(p);
  return checked(pool, (batch + slice - 1) / slice * blocks, batch * p.entries * p.height,
                 [&](int64_t task) { return f(task / blocks, task % blocks); });
}

// f(t, k0, k1) for parts of the features of every tile.
template <typename F>
void by_features(ffi::ThreadPool& pool, int64_t batch, int64_t features, int64_t operations, const F& f) {
  const int64_t parts = (features + 255) / 256;
  parallel(pool, tile_count(batch) * parts, operations, [&](int64_t task) {
    const int64_t k0 = task % parts * 256;
    f(task / parts, k0, std::min(features, k0 + 256));
  });
}

ffi::Error Tile(ffi::ThreadPool pool, Activations x, F32Result tiles, int64_t asked) {
  const Kernels* k = level(asked);
  if (!k) return kNoLevel;
  if (x.dimensions().size() != 2) return invalid("rank of the activations");
  const int64_t batch = x.dimensions()[0], rows = x.dimensions()[1];
  if (!is_floats(x.element_type(), batch)) return invalid("type of the activations");
  if ((int64_t)tiles->element_count() < times({tiled_batch(batch, k->lanes), rows})) return tiles_invalid();
  by_features(pool, batch, rows, batch * rows * MOVE, [&](int64_t t, int64_t k0, int64_t k1) {
    k->tile(floats(x), tiles->typed_data(), batch, rows, t, k0, k1);
  });
  return ffi::Error::Success();
}

ffi::Error gather(ffi::ThreadPool& pool, const Kernels& k, const F32& tiles, Floats values, int64_t value_count,
                  const U16& indices, const S32& starts, ActivationsResult& y, int64_t rows, int64_t height,
                  int64_t block) {
  if (y->dimensions().size() != 2) return invalid("rank of the result");
  const int64_t batch = y->dimensions()[0], outputs = y->dimensions()[1];
  if (!is_floats(y->element_type(), batch)) return invalid("type of the result");
  if (values.half && batch > 1) return invalid("type of the values");
  Pattern p;
  if (auto e = make_pattern(indices, starts, value_count, rows, outputs, height, block, p); e.failure()) return e;
  if (!holds_tiles(tiles, batch, rows, k)) return tiles_invalid();
  // Single weights of a single row are limited by loads, not by arithmetic.
  const int64_t work = batch == 1 && p.height == 1 ? p.entries * MOVE : batch * p.entries * p.height;
  return by_chunks(pool, p, tile_count(batch), work, [&](int64_t t, int64_t u0, int64_t u1) {
    return k.gather(p, tiles.typed_data(), values, floats(*y), batch, t, u0, u1);
  });
}

ffi::Error Gather(ffi::ThreadPool pool, F32 tiles, ffi::AnyBuffer values, U16 indices, S32 starts, ActivationsResult y,
                  int64_t rows, int64_t height, int64_t block, int64_t asked) {
  const Kernels* k = level(asked);
  if (!k) return kNoLevel;
  const ffi::DataType type = values.element_type();
  if (type != ffi::DataType::F32 && type != ffi::DataType::BF16) return invalid("type of the values");
  return gather(pool, *k, tiles, floats(values), values.element_count(), indices, starts, y, rows, height, block);
}

// The values are in the order of another pattern: value i of this one is values[order[i]].
ffi::Error GatherOrdered(ffi::ThreadPool pool, F32 tiles, F32 values, S32 order, U16 indices, S32 starts, ActivationsResult y,
                         int64_t rows, int64_t block, int64_t asked) {
  const Kernels* k = level(asked);
  if (!k) return kNoLevel;
  if (values.element_count() > kMost) return invalid("number of values");
  float* v = ordered(pool, *k, values.typed_data(), values.element_count(), order);
  if (!v) return indices_invalid();
  return gather(pool, *k, tiles, {v, false}, order.element_count(), indices, starts, y, rows, 1, block);
}

ffi::Error Scatter(ffi::ThreadPool pool, F32 tiles, F32 values, U16 indices, S32 starts, ActivationsResult dx, int64_t outputs,
                   int64_t height, int64_t block, int64_t asked) {
  const Kernels* k = level(asked);
  if (!k) return kNoLevel;
  if (dx->dimensions().size() != 2) return invalid("rank of the result");
  if (height == 1) return invalid("height");
  const int64_t batch = dx->dimensions()[0], rows = dx->dimensions()[1], entries = values.element_count();
  if (!is_floats(dx->element_type(), batch)) return invalid("type of the result");
  Pattern p;
  if (auto e = make_pattern(indices, starts, entries, rows, outputs, height, block, p); e.failure()) return e;
  if (!holds_tiles(tiles, batch, outputs, *k)) return tiles_invalid();
  return by_slices(pool, p, batch, SLICE * k->lanes, [&](int64_t slice, int64_t block) {
    return k->scatter(p, tiles.typed_data(), values.typed_data(), floats(*dx), batch, slice, block);
  });
}

ffi::Error Dots(ffi::ThreadPool pool, F32 x, F32 dy, U16 indices, S32 starts, F32Result dvalues, int64_t batch,
                int64_t rows, int64_t outputs, int64_t height, int64_t block, int64_t asked) {
  const Kernels* k = level(asked);
  if (!k) return kNoLevel;
  const int64_t entries = dvalues->element_count();
  Pattern p;
  if (auto e = make_pattern(indices, starts, entries, rows, outputs, height, block, p); e.failure()) return e;
  if (batch < 1 || batch > kMost || !holds_tiles(x, batch, rows, *k) || !holds_tiles(dy, batch, outputs, *k))
    return tiles_invalid();
  clear_padding(dvalues, starts, height);
  return by_chunks(pool, p, block_count(p), batch * entries, [&](int64_t block, int64_t u0, int64_t u1) {
    return k->dots(p, x.typed_data(), dy.typed_data(), dvalues->typed_data(), batch, block, u0, u1);
  });
}

// ---- bfloat16 -----------------------------------------------------------------------------------------------------

using BF16 = ffi::Buffer<ffi::BF16>;
using BF16Result = ffi::ResultBuffer<ffi::BF16>;
using U16Result = ffi::ResultBuffer<ffi::U16>;

const uint16_t* words(const BF16& x) { return (const uint16_t*)x.untyped_data(); }

bool holds_half_tiles(int64_t size, int64_t batch, int64_t features) {
  return size >= times({tile_count(batch), TILE, features});
}

ffi::Error HalfTile(ffi::ThreadPool pool, BF16 x, U16Result tiles, int64_t asked) {
  const HalfKernels* k = half_level(asked);
  if (!k) return kNoLevel;
  if (x.dimensions().size() != 2) return invalid("rank of the activations");
  const int64_t batch = x.dimensions()[0], features = x.dimensions()[1];
  if (!holds_half_tiles(tiles->element_count(), batch, features)) return tiles_invalid();
  by_features(pool, batch, features, batch * features * MOVE / 2, [&](int64_t t, int64_t k0, int64_t k1) {
    k->tile(words(x), tiles->typed_data(), batch, features, t, k0, k1);
  });
  return ffi::Error::Success();
}

ffi::Error half_gather(ffi::ThreadPool& pool, const HalfKernels& k, const U16& tiles, const uint16_t* values,
                       int64_t value_count, const U16& indices, const S32& starts, BF16Result& y, int64_t rows,
                       int64_t height, int64_t block) {
  if (y->dimensions().size() != 2) return invalid("rank of the result");
  const int64_t batch = y->dimensions()[0], outputs = y->dimensions()[1];
  Pattern p;
  if (auto e = make_pattern(indices, starts, value_count, rows, outputs, height, block, p); e.failure()) return e;
  if (!holds_half_tiles(tiles.element_count(), batch, rows)) return tiles_invalid();
  return by_chunks(pool, p, tile_count(batch), batch * value_count, [&](int64_t t, int64_t u0, int64_t u1) {
    return k.gather(p, tiles.typed_data(), values, (Half*)y->untyped_data(), batch, t, u0, u1);
  });
}

ffi::Error HalfGather(ffi::ThreadPool pool, U16 tiles, BF16 values, U16 indices, S32 starts, BF16Result y, int64_t rows,
                      int64_t height, int64_t block, int64_t asked) {
  const HalfKernels* k = half_level(asked);
  if (!k) return kNoLevel;
  return half_gather(pool, *k, tiles, words(values), values.element_count(), indices, starts, y, rows, height, block);
}

// The values are in the order of another pattern, as in GatherOrdered.
ffi::Error HalfGatherOrdered(ffi::ThreadPool pool, U16 tiles, BF16 values, S32 order, U16 indices, S32 starts,
                             BF16Result y, int64_t rows, int64_t block, int64_t asked) {
  const HalfKernels* k = half_level(asked);
  if (!k) return kNoLevel;
  if (values.element_count() > kMost) return invalid("number of values");
  const uint16_t* v = ordered(pool, *k, words(values), values.element_count(), order);
  if (!v) return indices_invalid();
  return half_gather(pool, *k, tiles, v, order.element_count(), indices, starts, y, rows, 1, block);
}

ffi::Error HalfScatter(ffi::ThreadPool pool, U16 tiles, BF16 values, U16 indices, S32 starts, BF16Result dx,
                       int64_t outputs, int64_t height, int64_t block, int64_t asked) {
  const HalfKernels* k = half_level(asked);
  if (!k) return kNoLevel;
  if (dx->dimensions().size() != 2) return invalid("rank of the result");
  if (height == 1) return invalid("height");
  const int64_t batch = dx->dimensions()[0], rows = dx->dimensions()[1], count = values.element_count();
  Pattern p;
  if (auto e = make_pattern(indices, starts, count, rows, outputs, height, block, p); e.failure()) return e;
  if (!holds_half_tiles(tiles.element_count(), batch, outputs)) return tiles_invalid();
  return by_slices(pool, p, batch, HALF_SLICE, [&](int64_t slice, int64_t block) {
    return k->scatter(p, tiles.typed_data(), words(values), (Half*)dx->untyped_data(), batch, slice, block);
  });
}

ffi::Error HalfDots(ffi::ThreadPool pool, U16 x, U16 dy, U16 indices, S32 starts, F32Result dvalues, int64_t batch,
                    int64_t rows, int64_t outputs, int64_t height, int64_t block, int64_t asked) {
  const HalfKernels* k = half_level(asked);
  if (!k) return kNoLevel;
  const int64_t entries = dvalues->element_count();
  Pattern p;
  if (auto e = make_pattern(indices, starts, entries, rows, outputs, height, block, p); e.failure()) return e;
  if (batch < 1 || batch > kMost || !holds_half_tiles(x.element_count(), batch, rows) ||
      !holds_half_tiles(dy.element_count(), batch, outputs))
    return tiles_invalid();
  clear_padding(dvalues, starts, height);
  return by_chunks(pool, p, block_count(p), batch * entries, [&](int64_t block, int64_t u0, int64_t u1) {
    return k->dots(p, x.typed_data(), dy.typed_data(), dvalues->typed_data(), batch, block, u0, u1);
  });
}

}  // namespace

// clang-format off
#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_tile, Tile, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<Activations>().Ret<F32>()
    .Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_gather, Gather, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<F32>().Arg<ffi::AnyBuffer>().Arg<U16>().Arg<S32>().Ret<Activations>()
    .Attr<int64_t>("rows").Attr<int64_t>("height").Attr<int64_t>("block").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_gather_ordered, GatherOrdered, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<F32>().Arg<F32>().Arg<S32>().Arg<U16>().Arg<S32>().Ret<Activations>()
    .Attr<int64_t>("rows").Attr<int64_t>("block").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_scatter, Scatter, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<F32>().Arg<F32>().Arg<U16>().Arg<S32>().Ret<Activations>()
    .Attr<int64_t>("outputs").Attr<int64_t>("height").Attr<int64_t>("block").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_dots, Dots, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<F32>().Arg<F32>().Arg<U16>().Arg<S32>().Ret<F32>()
    .Attr<int64_t>("batch").Attr<int64_t>("rows").Attr<int64_t>("outputs")
    .Attr<int64_t>("height").Attr<int64_t>("block").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_half_tile, HalfTile, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<BF16>().Ret<ffi::Buffer<ffi::U16>>()
    .Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_half_gather, HalfGather, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<U16>().Arg<BF16>().Arg<U16>().Arg<S32>().Ret<BF16>()
    .Attr<int64_t>("rows").Attr<int64_t>("height").Attr<int64_t>("block").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_half_gather_ordered, HalfGatherOrdered, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<U16>().Arg<BF16>().Arg<S32>().Arg<U16>().Arg<S32>().Ret<BF16>()
    .Attr<int64_t>("rows").Attr<int64_t>("block").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_half_scatter, HalfScatter, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<U16>().Arg<BF16>().Arg<U16>().Arg<S32>().Ret<BF16>()
    .Attr<int64_t>("outputs").Attr<int64_t>("height").Attr<int64_t>("block").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_half_dots, HalfDots, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<U16>().Arg<U16>().Arg<U16>().Arg<S32>().Ret<F32>()
    .Attr<int64_t>("batch").Attr<int64_t>("rows").Attr<int64_t>("outputs")
    .Attr<int64_t>("height").Attr<int64_t>("block").Attr<int64_t>("level"));
#pragma GCC visibility pop
