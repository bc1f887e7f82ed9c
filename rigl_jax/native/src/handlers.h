// What the XLA FFI handlers of products and convolutions share.
#pragma once
#include <algorithm>
#include <vector>

#include "levels.h"
#include "parallel.h"

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using U16 = ffi::Buffer<ffi::U16>;
using S32 = ffi::Buffer<ffi::S32>;
using F32Result = ffi::ResultBuffer<ffi::F32>;

inline const ffi::Error kNoLevel(ffi::ErrorCode::kUnimplemented,
                                 "rigl_jax: this processor lacks the kernel level that was asked for");

// Scratch of the calling thread, kept between calls: fresh pages would cost more than the work done in them.
template <typename T, int Use>
T* scratch(int64_t size) {
  thread_local std::vector<T> kept;
  if ((int64_t)kept.size() < size) kept.resize(size);
  return kept.data();
}

// values[order[i]] for every i, in scratch of this thread.
inline const float* ordered(ffi::ThreadPool& pool, const float* values, const S32& order) {
  const int64_t n = order.element_count(), part = 16384;
  float* out = scratch<float, 0>(n);
  const int32_t* from = order.typed_data();
  parallel(pool, (n + part - 1) / part, n * 4, [&](int64_t task) {
    for (int64_t i = task * part, end = std::min(n, i + part); i < end; i++) out[i] = values[from[i]];
  });
  return out;
}
