// Shared by the XLA FFI handlers of products, convolutions and rankings.
#pragma once
#include <algorithm>
#include <atomic>
#include <limits>
#include <string>
#include <vector>

#include "levels.h"
#include "parallel.h"

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using U16 = ffi::Buffer<ffi::U16>;
using S32 = ffi::Buffer<ffi::S32>;
using F32Result = ffi::ResultBuffer<ffi::F32>;

using Activations = ffi::AnyBuffer;  // F32 or BF16
using ActivationsResult = ffi::Result<ffi::AnyBuffer>;

inline const ffi::Error kNoLevel(ffi::ErrorCode::kUnimplemented,
                                 "rigl_jax: this processor lacks the kernel level that was asked for");

// Scratch memory of the calling thread, kept between calls: new pages would cost more time than the work in them.
template <typename T, int Use>
T* scratch(int64_t size) {
  thread_local std::vector<T> kept;
  if ((int64_t)kept.size() < size) kept.resize(size);
  return kept.data();
}

// All arguments are checked: sizes and attributes before a kernel runs, the content of index arrays by the kernels. So
// a damaged pattern is an error, and never a read or a write outside of its arrays.
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // of any one size, and of entries

inline ffi::Error invalid(const char* what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                    std::string("rigl_jax: damaged pattern, or one of another weight: ") + what);
}

inline ffi::Error indices_invalid() { return invalid("an index, or where a segment starts, is out of range"); }

// The product of sizes, none negative; the largest int64 if it overflows.
inline int64_t times(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (int64_t size : sizes)
    if (__builtin_mul_overflow(product, size, &product)) return std::numeric_limits<int64_t>::max();
  return product;
}

// Whether images, or a matrix of so many rows, may have this type: bfloat16 is for more than one row.
inline bool is_floats(ffi::DataType type, int64_t rows = 2) {
  return type == ffi::DataType::F32 || (type == ffi::DataType::BF16 && rows > 1);
}

inline Floats floats(const ffi::AnyBuffer& x) { return {x.untyped_data(), x.element_type() == ffi::DataType::BF16}; }

// The arrays of a pattern of `blocks` * `units` segments, with values for `entries` runs of `height`. The last of these
// may be padding, which no segment holds.
inline ffi::Error check_arrays(const U16& indices, const S32& starts, int64_t values, int64_t blocks, int64_t units,
                               int64_t height) {
  const int64_t entries = indices.element_count(), segments = times({blocks, units});
  if (entries > kMost || (int64_t)starts.element_count() - 1 != segments) return invalid("length of starts");
  if (values != times({entries, height})) return invalid("number of values");
  const int64_t end = starts.typed_data()[segments];
  if (starts.typed_data()[0] != 0 || end < 0 || end > entries) return invalid("ends of starts");
  if (end < entries && indices.typed_data()[entries - 1] != kPadding) return invalid("ends of starts");
  return ffi::Error::Success();
}

// The gradient of the values of padding: 0.
inline void clear_padding(F32Result& dvalues, const S32& starts, int64_t height) {
  const int64_t used = starts.typed_data()[starts.element_count() - 1] * height;
  std::fill(dvalues->typed_data() + used, dvalues->typed_data() + dvalues->element_count(), 0.0f);
}

// values[order[i]] for every i, in scratch memory of this thread; null if an order is out of range. `k` are kernels for
// values of this type.
template <typename T, typename K>
T* ordered(ffi::ThreadPool& pool, const K& k, const T* values, int64_t count, const S32& order) {
  const int64_t n = order.element_count(), part = 4096;
  T* out = scratch<T, 0>(n);
  std::atomic<bool> sound{true};
  parallel(pool, (n + part - 1) / part, n * 2 * MOVE, [&](int64_t task) {
    const int64_t first = task * part;
    if (!k.reorder(values, count, order.typed_data() + first, std::min(part, n - first), out + first)) sound = false;
  });
  return sound ? out : nullptr;
}
