// Products with a sparse matrix W: single weights (height 1), or runs of 16 outputs that share an input (height 16).
//
// gather: y = x @ W, and with the transposed pattern dx = dy @ W.T. A block of threads owns some outputs and 128 examples.
//   It stages the activations of a chunk of inputs in shared memory; a warp walks the entries of its outputs, each lane
//   with four examples, and sums in registers.
// gather of one example: a warp for each output, its lanes side by side in the entries, which are read once.
// scatter: dx = dy @ W.T for runs, whose patterns are not stored transposed. A block owns some inputs and 256 examples,
//   whose sums are in shared memory: a thread is the only one that adds for its example.
// dots: dW = x.T @ dy at the entries. A block owns a chunk of inputs and some outputs, and goes through all examples.
// All sum in f32, in an order that does not change from call to call.
//
// Patterns may hold anything: `check_pattern` looks first. If one is damaged, the kernels fill their results with NaN.
#include <algorithm>

#include "device.h"
#include "kernels.h"

namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kMine = 4, kColumns = 32 * kMine;  // examples of a lane, and of a block
constexpr int kMostBlocks = 65535;               // in the second direction of a grid

// Units of a warp.
template <int H>
constexpr int kUnitsOfGather = H == 1 ? 4 : 1;
template <int H>
constexpr int kUnitsOfDots = H == 1 ? 8 : 2;

template <typename T>
constexpr int kRows = kShared / (kColumns * sizeof(T));  // inputs in a chunk

constexpr uint16_t kPadding = 0xffff;  // PADDING in kernels/sorting.py

// The values of an entry, read at once.
template <typename T, int H>
struct alignas(std::min<int>(16, H * sizeof(T))) Run {
  T values[H];
};

struct Pattern {
  Span<const uint16_t> indices;
  Span<const int32_t> starts;
  Span<const int32_t> order;
  int64_t entries, rows, units, block, blocks;

  __device__ int32_t first(int64_t s) const { return starts[s]; }
  __device__ int32_t end(int64_t s) const { return starts[s + 1]; }
  __device__ bool is_segment(int64_t s) const {
    return first(s) >= 0 && first(s) <= end(s) && end(s) <= entries;
  }
  // Entries that are no padding.
  __device__ int32_t used() const { return starts[blocks * units]; }
  __device__ bool is_whole() const {
    const int32_t end = used();
    if (starts[0] != 0 || end < 0 || end > entries) return false;
    return end == entries || indices[entries - 1] == kPadding;
  }
  __device__ int64_t rows_in(int64_t b) const { return block < rows - b * block ? block : rows - b * block; }
  // The first entry of segment s that is at `row` of its block or after. Segments ascend.
  __device__ int32_t first_from(int64_t s, int64_t row) const {
    int32_t low = first(s), high = end(s);
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (indices[middle] < row)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

// A warp for each segment in turn.
__global__ void __launch_bounds__(kThreads) check_pattern(Pattern p, Span<uint32_t> bad) {
  const int lane = threadIdx.x % 32;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  bool sound = p.is_whole();
  for (int64_t s = thread / 32; s < p.blocks * p.units; s += threads / 32) {
    if (!p.is_segment(s)) {
      sound = false;
      continue;
    }
    const int64_t most = p.rows_in(s / p.units);
    for (int64_t e = p.first(s) + lane; e < p.end(s); e += 32)
      if (p.indices[e] >= most || (e > p.first(s) && p.indices[e - 1] >= p.indices[e])) sound = false;
  }
  for (int64_t i = thread; sound && p.order.size && i < p.used(); i += threads)
    if (p.order[i] < 0 || p.order[i] >= p.entries) sound = false;
  if (!sound) bad[0] = 1;
}

// Which example of a block is the i-th of a lane. Numbers of 16 bits are read in pairs.
template <typename T>
__device__ int column_of(int lane, int i);
template <>
__device__ inline int column_of<float>(int lane, int i) {
  return 32 * i + lane;
}
template <>
__device__ inline int column_of<Bf16>(int lane, int i) {
  return 64 * (i / 2) + 2 * lane + i % 2;
}

struct alignas(4) Pair {
  Bf16 first, second;
};

// A lane's examples of one staged input.
__device__ inline void read_columns(Span<float> staged, int row, int lane, float (&out)[kMine]) {
#pragma unroll
  for (int i = 0; i < kMine; i++) out[i] = staged[row * kColumns + 32 * i + lane];
}
__device__ inline void read_columns(Span<Bf16> staged, int row, int lane, float (&out)[kMine]) {
  const Span<Pair> pairs = {reinterpret_cast<Pair*>(staged.data), staged.size / 2};
#pragma unroll
  for (int i = 0; i < kMine / 2; i++) {
    const Pair pair = pairs[row * (kColumns / 2) + 32 * i + lane];
    out[2 * i] = to_float(pair.first), out[2 * i + 1] = to_float(pair.second);
  }
}

// x[from ... from + count, column ...] -> shared memory, with 0 for examples that do not exist.
template <typename T>
__device__ void stage(Span<const T> x, int64_t from, int count, int64_t column, int64_t batch, Span<T> staged) {
  for (int i = threadIdx.x; i < count * kColumns; i += kThreads) {
    const int64_t example = column + i % kColumns;
    staged[i] = example < batch ? x[(from + i / kColumns) * batch + example] : from_float<T>(0);
  }
}

template <typename T, int H>
__global__ void __launch_bounds__(kThreads)
    gather_many(Pattern p, Span<const T> x, Span<const Run<T, H>> values, Span<T> y, int64_t batch,
                Span<const uint32_t> bad) {
  constexpr int kUnits = kUnitsOfGather<H>;
  const Span<T> staged = dynamic_shared<T>(kRows<T> * kColumns);
  const int lane = threadIdx.x % 32;
  const int64_t unit = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) * kUnits;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kColumns;
  const bool sound = !bad[0];
  float sums[kUnits][H][kMine] = {};
  for (int64_t b = 0; b < p.blocks && sound; b++) {
    int32_t at[kUnits], end[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; u++) {
      const bool here = unit + u < p.units;
      at[u] = here ? p.first(b * p.units + unit + u) : 0;
      end[u] = here ? p.end(b * p.units + unit + u) : 0;
    }
    const int64_t rows = p.rows_in(b);
    for (int64_t low = 0; low < rows; low += kRows<T>) {
      const int count = static_cast<int>(rows - low < kRows<T> ? rows - low : kRows<T>);
      __syncthreads();
      stage(x, b * p.block + low, count, column, batch, staged);
      __syncthreads();
#pragma unroll
      for (int u = 0; u < kUnits; u++) {
        // The entries of a segment ascend: those of this chunk come first.
        for (int n = 32; n == 32; at[u] += n) {
          const int32_t mine = at[u] + lane;
          const int row = mine < end[u] ? static_cast<int>(p.indices[mine] - low) : count;
          const bool in = row < count;
          n = __popc(__ballot_sync(kAll, in));
          float value = 0;
          if (H == 1 && in) value = to_float(values[p.order.size ? p.order[mine] : mine].values[0]);
#pragma unroll 2
          for (int j = 0; j < n; j++) {
            float columns[kMine];
            read_columns(staged, __shfl_sync(kAll, row, j), lane, columns);
            if (H == 1) {
              const float weight = __shfl_sync(kAll, value, j);
#pragma unroll
              for (int i = 0; i < kMine; i++) sums[u][0][i] += weight * columns[i];
            } else {
              const Run<T, H> run = values[at[u] + j];
#pragma unroll
              for (int h = 0; h < H; h++)
#pragma unroll
                for (int i = 0; i < kMine; i++) sums[u][h][i] += to_float(run.values[h]) * columns[i];
            }
          }
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kMine; i++) {
    const int64_t example = column + column_of<T>(lane, i);
    if (example >= batch) continue;
#pragma unroll
    for (int u = 0; u < kUnits; u++)
#pragma unroll
      for (int h = 0; h < H; h++)
        if (unit + u < p.units)
          y[(example * p.units + unit + u) * H + h] = from_float<T>(sound ? sums[u][h][i] : not_a_number());
  }
}

constexpr int kFew = 256;  // threads of the next two

// One example. Everything is checked where it is read: a pass before would cost as much as the product.
template <typename T, int H>
__global__ void __launch_bounds__(kFew)
    gather_one(Pattern p, Span<const T> x, Span<const T> values, Span<T> y, bool stages) {
  const Span<T> staged = dynamic_shared<T>(stages ? p.rows : 0);
  for (int64_t i = threadIdx.x; i < staged.size; i += kFew) staged[i] = x[i];
  __syncthreads();
  const Span<const T> source = stages ? Span<const T>{staged.data, staged.size} : x;
  const int lane = threadIdx.x % 32;
  const float nan = not_a_number();
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * (kFew / 32) + threadIdx.x / 32; unit < p.units;
       unit += static_cast<int64_t>(gridDim.x) * (kFew / 32)) {
    float sum = p.is_whole() ? 0 : nan;
    for (int64_t b = 0; b < p.blocks; b++) {
      const int64_t s = b * p.units + unit, rows = p.rows_in(b);
      if (!p.is_segment(s)) {
        sum = nan;
        continue;
      }
      const int64_t end = static_cast<int64_t>(p.end(s)) * H;
#pragma unroll 4
      for (int64_t i = static_cast<int64_t>(p.first(s)) * H + lane; i < end; i += 32) {
        const int row = p.indices[i / H];
        const int64_t at = p.order.size ? p.order[i] : i;
        const bool in = row < rows && at >= 0 && at < values.size;
        sum += in ? to_float(values[at]) * to_float(source[b * p.block + row]) : nan;
      }
    }
    for (int step = 16; step >= H; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
    if (lane < H) y[unit * H + lane] = from_float<T>(sum);
  }
}

constexpr int kPitch = kFew + 1;  // of the sums of an input: odd, so that columns are read as fast as rows
constexpr int kSums = kShared / (kPitch * sizeof(float));  // inputs of a block

template <typename T, int H>
__global__ void __launch_bounds__(kFew)
    scatter_many(Pattern p, Span<const T> dy, Span<const Run<T, H>> values, Span<T> dx, int64_t batch,
                 Span<const uint32_t> bad) {
  const Span<float> sums = dynamic_shared<float>(kSums * kPitch);
  const int me = threadIdx.x, lane = me % 32;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kFew, example = column + me;
  const bool sound = !bad[0];
  const int64_t chunks = (p.block + kSums - 1) / kSums;
  for (int64_t c = blockIdx.x; c < p.blocks * chunks; c += gridDim.x) {
    const int64_t b = c / chunks, low = c % chunks * kSums, left = p.rows_in(b) - low;
    if (left <= 0) continue;  // the last block may be shorter
    const int count = static_cast<int>(left < kSums ? left : kSums);
    for (int r = 0; r < count; r++) sums[r * kPitch + me] = sound ? 0 : not_a_number();
    for (int64_t group = 0; group < p.units && sound; group += 32) {
      // Each lane finds the entries of one unit.
      const int64_t s = b * p.units + group + lane;
      const bool here = group + lane < p.units;
      const int32_t from = here ? p.first_from(s, low) : 0, to = here ? p.first_from(s, low + count) : 0;
      const int units = static_cast<int>(p.units - group < 32 ? p.units - group : 32);
      for (int u = 0; u < units; u++) {
        const int32_t begin = __shfl_sync(kAll, from, u), end = __shfl_sync(kAll, to, u);
        if (begin == end) continue;
        float own[H];
#pragma unroll
        for (int h = 0; h < H; h++)
          own[h] = example < batch ? to_float(dy[((group + u) * H + h) * batch + example]) : 0;
        for (int32_t e = begin; e < end; e++) {
          const Run<T, H> run = values[e];
          float sum = 0;
#pragma unroll
          for (int h = 0; h < H; h++) sum += own[h] * to_float(run.values[h]);
          sums[static_cast<int>(p.indices[e] - low) * kPitch + me] += sum;
        }
      }
    }
    __syncthreads();
    for (int i = me; i < count * kFew; i += kFew) {  // rows of dx are written side by side
      const int r = i % count, other = i / count;
      if (column + other < batch)
        dx[(column + other) * p.rows + b * p.block + low + r] = from_float<T>(sums[r * kPitch + other]);
    }
    __syncthreads();
  }
}

// Sums each of N numbers over the lanes of a warp. Lane l gets the sum of number l / (32 / N).
template <int N, int Step = 16>
__device__ float reduce(const float (&numbers)[N], int lane) {
  if constexpr (N == 1) {
    float sum = numbers[0];
#pragma unroll
    for (int step = Step; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
    return sum;
  } else {  // half of the lanes go on with half of the numbers
    float rest[N / 2];
    const bool upper = lane & Step;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      const float kept = upper ? numbers[i + N / 2] : numbers[i], sent = upper ? numbers[i] : numbers[i + N / 2];
      rest[i] = kept + __shfl_xor_sync(kAll, sent, Step);
    }
    return reduce<N / 2, Step / 2>(rest, lane);
  }
}

template <typename T, int H>
__global__ void __launch_bounds__(kThreads)
    dots_many(Pattern p, Span<const T> x, Span<const T> dy, Span<float> dvalues, int64_t batch,
              Span<const uint32_t> bad) {
  constexpr int kUnits = kUnitsOfDots<H>;
  constexpr int kEach = H == 1 ? 4 : 1;   // entries that are summed at once
  constexpr int kSummed = kEach * H, kShare = 32 / kSummed;
  const Span<T> staged = dynamic_shared<T>(kRows<T> * kColumns);
  const int lane = threadIdx.x % 32;
  const int64_t unit = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) * kUnits;
  // Padding gets 0, and of a damaged pattern everything NaN.
  const int64_t me = (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * gridDim.y * kThreads;
  for (int64_t i = me + (bad[0] ? 0 : static_cast<int64_t>(p.used()) * H); i < dvalues.size; i += threads)
    dvalues[i] = bad[0] ? not_a_number() : 0;
  if (bad[0]) return;
  const int64_t chunks = (p.block + kRows<T> - 1) / kRows<T>;
  for (int64_t c = blockIdx.y; c < p.blocks * chunks; c += gridDim.y) {
    const int64_t b = c / chunks, low = c % chunks * kRows<T>, left = p.rows_in(b) - low;
    if (left <= 0) continue;
    const int count = static_cast<int>(left < kRows<T> ? left : kRows<T>);
    // Lane u finds the entries of unit u.
    const bool here = lane < kUnits && unit + lane < p.units;
    const int64_t s = b * p.units + unit + lane;
    const int32_t from = here ? p.first_from(s, low) : 0, to = here ? p.first_from(s, low + count) : 0;
    for (int64_t column = 0; column < batch; column += kColumns) {
      __syncthreads();
      stage(x, b * p.block + low, count, column, batch, staged);
      __syncthreads();
      for (int u = 0; u < kUnits; u++) {
        const int32_t begin = __shfl_sync(kAll, from, u), end = __shfl_sync(kAll, to, u);
        if (begin == end) continue;
        float own[H][kMine];
#pragma unroll
        for (int h = 0; h < H; h++)
#pragma unroll
          for (int i = 0; i < kMine; i++) {
            const int64_t example = column + column_of<T>(lane, i);
            own[h][i] = example < batch ? to_float(dy[((unit + u) * H + h) * batch + example]) : 0;
          }
        for (int32_t first = begin; first < end; first += 32) {
          const int row = first + lane < end ? static_cast<int>(p.indices[first + lane] - low) : 0;
          const int n = end - first < 32 ? end - first : 32;
          for (int j = 0; j < n; j += kEach) {
            float numbers[kSummed];
#pragma unroll
            for (int q = 0; q < kEach; q++) {
              float columns[kMine];
              read_columns(staged, __shfl_sync(kAll, row, j + q), lane, columns);
#pragma unroll
              for (int h = 0; h < H; h++) {
                float sum = 0;
#pragma unroll
                for (int i = 0; i < kMine; i++) sum += columns[i] * own[h][i];
                numbers[q * H + h] = sum;
              }
            }
            const float sum = reduce(numbers, lane);
            const int number = lane / kShare;  // entry j + number / H, output number % H
            if (lane % kShare == 0 && j + number / H < n) {
              float& out = dvalues[static_cast<int64_t>(first + j) * H + number];
              out = column == 0 ? sum : out + sum;
            }
          }
        }
      }
    }
  }
}

Pattern pattern_of(const Product& p) {
  const Matrix& m = p.pattern;
  return {{m.indices, m.entries}, {m.starts, m.blocks() * m.units + 1}, {p.order, p.order ? m.entries : 0},
          m.entries, m.rows, m.units, m.block, m.blocks()};
}

unsigned limited(int64_t blocks, int64_t most) { return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, most)); }

int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

cudaError_t check(cudaStream_t stream, const Product& p) {
  const cudaError_t error = cudaMemsetAsync(p.bad, 0, sizeof(uint32_t), stream);
  if (error != cudaSuccess) return error;
  const Pattern pattern = pattern_of(p);
  const int64_t warps = std::max(pattern.blocks * pattern.units, p.pattern.entries / 256);
  launch(check_pattern, dim3(limited(parts(warps, kWarps), 1024)), kThreads, 0, stream, pattern,
         Span<uint32_t>{p.bad, 1});
  return cudaGetLastError();
}

template <typename T, int H>
cudaError_t gather_of(cudaStream_t stream, const Product& p, const void* x, const void* values, void* y) {
  const Pattern pattern = pattern_of(p);
  const Span<const T> from = {static_cast<const T*>(x), p.pattern.rows * p.batch};
  const Span<T> to = {static_cast<T*>(y), p.pattern.units * H * p.batch};
  if (p.batch == 1) {
    const int64_t bytes = p.pattern.rows * sizeof(T);
    const bool stages = bytes <= kShared;
    launch(gather_one<T, H>, dim3(limited(parts(p.pattern.units, kFew / 32), 528)), kFew, stages ? bytes : 0, stream,
           pattern, from, Span<const T>{static_cast<const T*>(values), p.pattern.entries * H}, to, stages);
    return cudaGetLastError();
  }
  const cudaError_t error = check(stream, p);
  if (error != cudaSuccess) return error;
  const dim3 grid(parts(p.pattern.units, kWarps * kUnitsOfGather<H>), parts(p.batch, kColumns));
  launch(gather_many<T, H>, grid, kThreads, kShared, stream, pattern, from,
         Span<const Run<T, H>>{static_cast<const Run<T, H>*>(values), p.pattern.entries}, to, p.batch,
         Span<const uint32_t>{p.bad, 1});
  return cudaGetLastError();
}

template <typename T, int H>
cudaError_t scatter_of(cudaStream_t stream, const Product& p, const void* dy, const void* values, void* dx) {
  const cudaError_t error = check(stream, p);
  if (error != cudaSuccess) return error;
  const Matrix& m = p.pattern;
  const dim3 grid(limited(m.blocks() * parts(m.block, kSums), 1 << 20), parts(p.batch, kFew));
  launch(scatter_many<T, H>, grid, kFew, kSums * kPitch * sizeof(float), stream, pattern_of(p),
         Span<const T>{static_cast<const T*>(dy), m.units * H * p.batch},
         Span<const Run<T, H>>{static_cast<const Run<T, H>*>(values), m.entries},
         Span<T>{static_cast<T*>(dx), m.rows * p.batch}, p.batch, Span<const uint32_t>{p.bad, 1});
  return cudaGetLastError();
}

template <typename T, int H>
cudaError_t dots_of(cudaStream_t stream, const Product& p, const void* x, const void* dy, float* dvalues) {
  const cudaError_t error = check(stream, p);
  if (error != cudaSuccess) return error;
  const Matrix& m = p.pattern;
  const dim3 grid(parts(m.units, kWarps * kUnitsOfDots<H>),
                  limited(m.blocks() * parts(m.block, kRows<T>), kMostBlocks));
  launch(dots_many<T, H>, grid, kThreads, kShared, stream, pattern_of(p),
         Span<const T>{static_cast<const T*>(x), m.rows * p.batch},
         Span<const T>{static_cast<const T*>(dy), m.units * H * p.batch}, Span<float>{dvalues, m.entries * H},
         p.batch, Span<const uint32_t>{p.bad, 1});
  return cudaGetLastError();
}

}  // namespace

cudaError_t usable() {
  cudaFuncAttributes found;
  return cudaFuncGetAttributes(&found, check_pattern);
}

cudaError_t gather(cudaStream_t stream, const Product& p, const void* x, const void* values, void* y) {
  if (p.pattern.height == 1)
    return p.bf16 ? gather_of<Bf16, 1>(stream, p, x, values, y) : gather_of<float, 1>(stream, p, x, values, y);
  return p.bf16 ? gather_of<Bf16, 16>(stream, p, x, values, y) : gather_of<float, 16>(stream, p, x, values, y);
}

cudaError_t scatter(cudaStream_t stream, const Product& p, const void* dy, const void* values, void* dx) {
  return p.bf16 ? scatter_of<Bf16, 16>(stream, p, dy, values, dx) : scatter_of<float, 16>(stream, p, dy, values, dx);
}

cudaError_t dots(cudaStream_t stream, const Product& p, const void* x, const void* dy, float* dvalues) {
  if (p.pattern.height == 1)
    return p.bf16 ? dots_of<Bf16, 1>(stream, p, x, dy, dvalues) : dots_of<float, 1>(stream, p, x, dy, dvalues);
  return p.bf16 ? dots_of<Bf16, 16>(stream, p, x, dy, dvalues) : dots_of<float, 16>(stream, p, x, dy, dvalues);
}
