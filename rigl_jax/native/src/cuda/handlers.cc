// XLA FFI handlers. Nothing here reads device memory: sizes and types are checked, the kernels check contents.
#include <algorithm>
#include <limits>
#include <string>

#include "xla/ffi/api/ffi.h"

#include "kernels.h"
#ifdef RIGL_EMULATED
#include "emulated_stream.h"
#endif

namespace {

namespace ffi = xla::ffi;
using Any = ffi::AnyBuffer;
using U16 = ffi::Buffer<ffi::U16>;
using S32 = ffi::Buffer<ffi::S32>;
using Word = ffi::Result<ffi::Buffer<ffi::U32>>;

#ifdef RIGL_EMULATED
using Stream = EmulatedStream;
#else
using Stream = ffi::PlatformStream<cudaStream_t>;
#endif

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // of any one size, and of entries
constexpr int64_t kMostExamples = 65535 * 128;

ffi::Error invalid(const char* what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, std::string("rigl_jax: CUDA kernel: ") + what);
}

ffi::Error started(cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal, std::string("rigl_jax: CUDA kernel: ") + cudaGetErrorString(error));
}

// The product of sizes, none negative; the largest int64 if it overflows.
int64_t times(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? std::numeric_limits<int64_t>::max() : product;
}

int64_t count(const Any& a) { return static_cast<int64_t>(a.element_count()); }

bool is_bytes(const Any& a) { return a.element_type() == ffi::PRED; }

// k[..., leaves], then (scores[..., n], among[..., n] or [..., 0]) of each leaf -> memory, then taken[..., n] of each. The
// axes before are those of vmap: each combination is a search of its own.
ffi::Error Select(cudaStream_t stream, S32 k, ffi::RemainingArgs given, Word work, ffi::RemainingRets results) {
  const auto axes = k.dimensions();
  const int64_t leaves = axes.size() ? axes.back() : 0;
  if (leaves < 1 || given.size() != 2 * static_cast<size_t>(leaves) || results.size() != static_cast<size_t>(leaves))
    return invalid("numbers of counts, of scores and of results differ");
  const int64_t groups = static_cast<int64_t>(k.element_count()) / leaves;
  std::vector<Leaf> jobs(groups * leaves);
  ffi::DataType type = ffi::F32;
  for (int64_t i = 0; i < leaves; i++) {
    const auto scores = given.get<Any>(2 * i), among = given.get<Any>(2 * i + 1);
    auto taken = results.get<Any>(i);
    if (!scores || !among || !taken) return invalid("an array of scores is not readable");
    if (i == 0) type = scores->element_type();
    const int64_t size = count(*scores), n = groups ? size / groups : 0;
    if (scores->element_type() != type || (type != ffi::F32 && type != ffi::BF16 && type != ffi::F16))
      return invalid("scores must be all float32, all bfloat16 or all float16");
    if (n < 1 || n > kMost || n * groups != size || count(**taken) != size || !is_bytes(**taken) ||
        !is_bytes(*among) || (count(*among) != size && count(*among) != 0))
      return invalid("sizes of scores, candidates and results differ");
    const int64_t bytes = n * (type == ffi::F32 ? 4 : 2);
    for (int64_t g = 0; g < groups; g++)
      jobs[g * leaves + i] = {static_cast<const char*>(scores->untyped_data()) + g * bytes,
                              count(*among) ? static_cast<const uint8_t*>(among->untyped_data()) + g * n : nullptr,
                              static_cast<uint8_t*>((*taken)->untyped_data()) + g * n, static_cast<int32_t>(n), 0};
  }
  if (static_cast<int64_t>(work->element_count()) < times(jobs.size(), kPerLeaf) + kBlocks) return invalid("memory");
  const Scores kind = type == ffi::F32 ? Scores::F32 : type == ffi::BF16 ? Scores::BF16 : Scores::F16;
  for (size_t first = 0; first < jobs.size(); first += kLeaves) {
    const auto begin = jobs.begin() + first, end = jobs.begin() + std::min(jobs.size(), first + kLeaves);
    const cudaError_t error = select(stream, kind, {begin, end}, k.typed_data() + first, work->typed_data());
    if (error != cudaSuccess) return started(error);
  }
  return ffi::Error::Success();
}

struct Checked {
  Product product;
  ffi::Error error = ffi::Error::Success();
};

// The pattern of a matrix [rows, outputs], after a check that its sizes fit its arrays.
Checked checked(const U16& indices, const S32& starts, int64_t rows, int64_t outputs, int64_t height, int64_t block,
                int64_t batch, ffi::DataType type, Word& bad) {
  const int64_t entries = indices.element_count();
  Checked c = {{{indices.typed_data(), starts.typed_data(), entries, rows, outputs / std::max<int64_t>(height, 1),
                 height, block},
                nullptr, batch, type == ffi::BF16, bad->typed_data()}};
  if (type != ffi::F32 && type != ffi::BF16) c.error = invalid("activations must be float32 or bfloat16");
  else if (height != 1 && height != 16) c.error = invalid("height must be 1 or 16");
  else if (block < 1 || block > 1 << 16) c.error = invalid("block must be 1 to 65536");
  else if (rows < 1 || rows > kMost || outputs < 1 || outputs > kMost || outputs % height || entries > kMost)
    c.error = invalid("size of the weight");
  else if (batch < 1 || batch > kMostExamples) c.error = invalid("number of examples");
  else if (bad->element_count() != 1) c.error = invalid("memory");
  else if (static_cast<int64_t>(starts.element_count()) - 1 != times(c.product.pattern.blocks(), outputs / height))
    c.error = invalid("length of starts");
  return c;
}

// Whether an array is a matrix of these sizes and of this type.
bool is_matrix(const Any& a, int64_t rows, int64_t columns, ffi::DataType type) {
  const auto sizes = a.dimensions();
  return sizes.size() == 2 && sizes[0] == rows && sizes[1] == columns && a.element_type() == type;
}

// x[rows, batch], values, order[entries] or [0] -> y[batch, outputs].
ffi::Error Gather(cudaStream_t stream, Any x, Any values, S32 order, U16 indices, S32 starts, ffi::Result<Any> y,
                  Word bad, int64_t height, int64_t block) {
  if (x.dimensions().size() != 2 || y->dimensions().size() != 2) return invalid("ranks of activations");
  const int64_t rows = x.dimensions()[0], batch = x.dimensions()[1], outputs = y->dimensions()[1];
  Checked c = checked(indices, starts, rows, outputs, height, block, batch, x.element_type(), bad);
  if (c.error.failure()) return c.error;
  const int64_t entries = c.product.pattern.entries, ordered = order.element_count();
  if (!is_matrix(*y, batch, outputs, x.element_type())) return invalid("size of the result");
  if (count(values) != times(entries, height) || values.element_type() != x.element_type())
    return invalid("number or type of values");
  if (ordered != 0 && (ordered != entries || height != 1)) return invalid("order");
  if (ordered) c.product.order = order.typed_data();
  return started(gather(stream, c.product, x.untyped_data(), values.untyped_data(), y->untyped_data()));
}

// dy[outputs, batch], values -> dx[batch, rows].
ffi::Error Scatter(cudaStream_t stream, Any dy, Any values, U16 indices, S32 starts, ffi::Result<Any> dx, Word bad,
                   int64_t height, int64_t block) {
  if (dy.dimensions().size() != 2 || dx->dimensions().size() != 2) return invalid("ranks of activations");
  const int64_t outputs = dy.dimensions()[0], batch = dy.dimensions()[1], rows = dx->dimensions()[1];
  Checked c = checked(indices, starts, rows, outputs, height, block, batch, dy.element_type(), bad);
  if (c.error.failure()) return c.error;
  if (height != 16) return invalid("height must be 16");
  if (!is_matrix(*dx, batch, rows, dy.element_type())) return invalid("size of the result");
  if (count(values) != times(c.product.pattern.entries, height) || values.element_type() != dy.element_type())
    return invalid("number or type of values");
  return started(scatter(stream, c.product, dy.untyped_data(), values.untyped_data(), dx->untyped_data()));
}

// x[rows, batch], dy[outputs, batch] -> dvalues, f32.
ffi::Error Dots(cudaStream_t stream, Any x, Any dy, U16 indices, S32 starts,
                ffi::Result<ffi::Buffer<ffi::F32>> dvalues, Word bad, int64_t height, int64_t block) {
  if (x.dimensions().size() != 2 || dy.dimensions().size() != 2) return invalid("ranks of activations");
  const int64_t rows = x.dimensions()[0], batch = x.dimensions()[1], outputs = dy.dimensions()[0];
  Checked c = checked(indices, starts, rows, outputs, height, block, batch, x.element_type(), bad);
  if (c.error.failure()) return c.error;
  if (!is_matrix(dy, outputs, batch, x.element_type())) return invalid("gradients of another size or type");
  if (static_cast<int64_t>(dvalues->element_count()) != times(c.product.pattern.entries, height))
    return invalid("number of values");
  return started(dots(stream, c.product, x.untyped_data(), dy.untyped_data(), dvalues->typed_data()));
}

}  // namespace

#pragma GCC visibility push(default)
// Why the kernels cannot run on this machine's GPU, or null. Called through ctypes.
extern "C" const char* rigl_cuda_fault() {
  const cudaError_t error = usable();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// clang-format off
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_cuda_select, Select, ffi::Ffi::Bind().Ctx<Stream>()
    .Arg<S32>().RemainingArgs().Ret<ffi::Buffer<ffi::U32>>().RemainingRets(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_cuda_gather, Gather, ffi::Ffi::Bind().Ctx<Stream>()
    .Arg<Any>().Arg<Any>().Arg<S32>().Arg<U16>().Arg<S32>().Ret<Any>().Ret<ffi::Buffer<ffi::U32>>()
    .Attr<int64_t>("height").Attr<int64_t>("block"), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_cuda_scatter, Scatter, ffi::Ffi::Bind().Ctx<Stream>()
    .Arg<Any>().Arg<Any>().Arg<U16>().Arg<S32>().Ret<Any>().Ret<ffi::Buffer<ffi::U32>>()
    .Attr<int64_t>("height").Attr<int64_t>("block"), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_cuda_dots, Dots, ffi::Ffi::Bind().Ctx<Stream>()
    .Arg<Any>().Arg<Any>().Arg<U16>().Arg<S32>().Ret<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::U32>>()
    .Attr<int64_t>("height").Attr<int64_t>("block"), {ffi::Traits::kCmdBufferCompatible});
#pragma GCC visibility pop
