// XLA FFI handlers of the sparse matrix products. Shapes are checked by the Python side, which alone calls them.
#include "handlers.h"

namespace {

Pattern pattern(const U16& indices, const S32& starts, int64_t rows, int64_t height, int64_t block) {
  const int64_t blocks = std::max<int64_t>(1, (rows + block - 1) / block);
  return {indices.typed_data(), starts.typed_data(), rows, ((int64_t)starts.element_count() - 1) / blocks, height, block};
}

int64_t block_count(const Pattern& p) { return (p.rows + p.block - 1) / p.block; }

// Units to a task: as many as the task's buffer holds, fewer where that would leave threads idle.
int64_t chunk_of(const Pattern& p, int64_t others, int64_t threads) {
  const int64_t most = CHUNK / p.height;
  const int64_t fair = (p.units * others + 3 * threads - 1) / (3 * threads);
  const int64_t line = std::max<int64_t>(1, 16 / p.height);  // whole cache lines of the output
  return std::clamp((fair + line - 1) / line * line, line, most);
}

ffi::Error Tile(ffi::ThreadPool pool, F32 x, F32Result tiles, int64_t asked) {
  const Kernels* k = level(asked);
  if (!k) return kNoLevel;
  const int64_t batch = x.dimensions()[0], rows = x.dimensions()[1], parts = (rows + 255) / 256;
  parallel(pool, tile_count(batch) * parts, batch * rows, [&](int64_t task) {
    const int64_t t = task / parts, k0 = task % parts * 256;
    k->tile(x.typed_data(), tiles->typed_data(), batch, rows, t, k0, std::min(rows, k0 + 256));
  });
  return ffi::Error::Success();
}

void gather(ffi::ThreadPool& pool, const Kernels& k, const Pattern& p, const float* tiles, const float* values,
            int64_t entries, F32Result& y) {
  const int64_t batch = y->dimensions()[0], tiled = tile_count(batch);
  const int64_t chunk = chunk_of(p, tiled, pool.num_threads()), chunks = (p.units + chunk - 1) / chunk;
  // A single row is bound by loads, not by arithmetic: an entry costs as much as eight multiply-adds elsewhere.
  const int64_t work = batch == 1 && p.height == 1 ? entries * 8 : batch * entries * p.height;
  parallel(pool, tiled * chunks, work, [&](int64_t task) {
    const int64_t u0 = task % chunks * chunk;
    k.gather(p, tiles, values, y->typed_data(), batch, task / chunks, u0, std::min(p.units, u0 + chunk));
  });
}

ffi::Error Gather(ffi::ThreadPool pool, F32 tiles, F32 values, U16 indices, S32 starts, F32Result y, int64_t rows,
                  int64_t height, int64_t block, int64_t asked) {
  const Kernels* k = level(asked);
  if (!k) return kNoLevel;
  gather(pool, *k, pattern(indices, starts, rows, height, block), tiles.typed_data(), values.typed_data(),
         indices.element_count(), y);
  return ffi::Error::Success();
}

// The values arrive in the order of another pattern: value i of this one is values[order[i]].
ffi::Error GatherOrdered(ffi::ThreadPool pool, F32 tiles, F32 values, S32 order, U16 indices, S32 starts, F32Result y,
                         int64_t rows, int64_t block, int64_t asked) {
  const Kernels* k = level(asked);
  if (!k) return kNoLevel;
  const float* v = ordered(pool, values.typed_data(), order);
  gather(pool, *k, pattern(indices, starts, rows, 1, block), tiles.typed_data(), v,
         order.element_count(), y);
  return ffi::Error::Success();
}

ffi::Error Scatter(ffi::ThreadPool pool, F32 tiles, F32 values, U16 indices, S32 starts, F32Result dx, int64_t height,
                   int64_t block, int64_t asked) {
  const Kernels* k = level(asked);
  if (!k) return kNoLevel;
  const int64_t batch = dx->dimensions()[0], rows = dx->dimensions()[1];
  const Pattern p = pattern(indices, starts, rows, height, block);
  const int64_t blocks = block_count(p);
  parallel(pool, tile_count(batch) * blocks, batch * (int64_t)values.element_count(), [&](int64_t task) {
    k->scatter(p, tiles.typed_data(), values.typed_data(), dx->typed_data(), batch, task / blocks, task % blocks);
  });
  return ffi::Error::Success();
}

ffi::Error Dots(ffi::ThreadPool pool, F32 x, F32 dy, U16 indices, S32 starts, F32Result dvalues, int64_t batch,
                int64_t rows, int64_t height, int64_t block, int64_t asked) {
  const Kernels* k = level(asked);
  if (!k) return kNoLevel;
  const Pattern p = pattern(indices, starts, rows, height, block);
  const int64_t blocks = block_count(p), chunk = chunk_of(p, blocks, pool.num_threads());
  const int64_t chunks = (p.units + chunk - 1) / chunk;
  parallel(pool, blocks * chunks, batch * (int64_t)dvalues->element_count(), [&](int64_t task) {
    const int64_t u0 = task % chunks * chunk;
    k->dots(p, x.typed_data(), dy.typed_data(), dvalues->typed_data(), batch, task / chunks, u0,
            std::min(p.units, u0 + chunk));
  });
  return ffi::Error::Success();
}

}  // namespace

// clang-format off
#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_tile, Tile, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<F32>().Ret<F32>()
    .Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_gather, Gather, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<F32>().Arg<F32>().Arg<U16>().Arg<S32>().Ret<F32>()
    .Attr<int64_t>("rows").Attr<int64_t>("height").Attr<int64_t>("block").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_gather_ordered, GatherOrdered, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<F32>().Arg<F32>().Arg<S32>().Arg<U16>().Arg<S32>().Ret<F32>()
    .Attr<int64_t>("rows").Attr<int64_t>("block").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_scatter, Scatter, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<F32>().Arg<F32>().Arg<U16>().Arg<S32>().Ret<F32>()
    .Attr<int64_t>("height").Attr<int64_t>("block").Attr<int64_t>("level"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_dots, Dots, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<F32>().Arg<F32>().Arg<U16>().Arg<S32>().Ret<F32>()
    .Attr<int64_t>("batch").Attr<int64_t>("rows").Attr<int64_t>("height").Attr<int64_t>("block").Attr<int64_t>("level"));
#pragma GCC visibility pop
