// The kernels of one instruction-set level: plain functions on plain arrays; each call does one task on one thread.
//
// Index arrays may contain anything. Handlers check sizes; `sound` checks the content before it is used. Matrix
// products call it for the segments of their own task, which are then in the L1 cache.
//
// Activations are handled in tiles of TILE batch rows, feature-major: tile t of x[batch, rows] starts at
// t * TILE * rows and contains, for every feature, the batch rows of the tile side by side (`width` floats: TILE, or
// for the last tile the remaining rows, rounded up to the vector length and filled with zeros). So one weight is
// multiplied by a contiguous run of activations. A batch of one row is one tile of width 1.
#pragma once
#include <stdint.h>

enum {
  TILE = 64,         // batch rows in a tile
  CHUNK = 128,       // outputs that a task computes in its cache before it writes them
  SLICE = 2,         // vectors of batch rows in a task of `scatter`: a whole block of dx stays in its cache
  HALF_SLICE = 32,   // batch rows of such a task in bfloat16
  RUN_BLOCK = 1024,  // largest block of rows for patterns with height > 1
  PIXELS = 8,        // pixels of a row in one pass
  SPAN = 64,         // pixels of a row in one task
  ROW_BUFFER = 16384,  // floats of output that a task of a convolution holds
};

// False only in the build with which experiments/benchmarks/checks.py measures the cost of the checks.
#ifdef RIGL_UNCHECKED
constexpr bool CHECKED = false;
#else
constexpr bool CHECKED = true;
#endif

constexpr uint16_t kPadding = 0xffff;  // index of an entry that is padding; PADDING in kernels/sorting.py

struct Half {  // bfloat16
  uint16_t bits;
};

// Row-major activations, NHWC images, or values: floats, or bfloat16 if `half`. Activations of one row are always floats.
struct Floats {
  void* data;
  bool half;
};

// Nonzeros of a matrix [rows, units * height], whose rows are divided into blocks of `block`: sorted by block, then by
// unit, then by row. Entry i of segment s = block * units + unit, starts[s] <= i < starts[s + 1], is the run of
// `height` weights at row block * `block` + indices[i], columns unit * height and on.
struct Pattern {
  const uint16_t* indices;
  const int32_t* starts;
  int64_t entries, rows, units, height, block;
};

// NHWC images [batch, height, width, channels] with margins, as [group][padded_height][channels][padded_width][lanes]:
// `lanes` images side by side. Image row 0 is plane row `top`. Planes of bfloat16 hold twice as many images side by side,
// in an order of their own.
struct Planes {
  int64_t batch, height, width, channels;
  int64_t top, left, padded_height, padded_width;
};

// One convolution as sums over planes: out[y, x, unit] = sum of values[i] * plane[step * (y / phase), step * (x /
// phase)] at offsets[indices[i]], over the entries i of segment (block * phases + phase of (y, x)) * units + unit. A
// block is `block` channels of the planes; an index is channel in block * taps + tap. Phases are for the gradient of a
// strided convolution, where only every stride-th tap reaches an input pixel; otherwise there is one phase. Channels and
// units are divided into `groups` parts of equal size: a unit reads the channels of its own group, in blocks of these.
struct Reader {
  const uint16_t* indices;
  const int32_t* starts;
  const int32_t* offsets;  // numbers of a plane, for each index
  int64_t batch, plane_height, plane_width, channels, block;  // of the planes that are read
  int64_t height, width, units;                               // of the images that are written
  int64_t step_y, step_x, phase_y, phase_x, groups;
};

struct Kernels {
  const char* name;
  int64_t lanes;

  // Whether starts[0] ... starts[count] ascend within `entries`, and the indices of their segments are below `bound`.
  bool (*sound)(const uint16_t* indices, const int32_t* starts, int64_t count, int64_t entries, int64_t bound);
  // out[i] = values[order[i]] for i < count; false where an order is not in [0, n), with n <= 2^31.
  bool (*reorder)(const float* values, int64_t n, const int32_t* order, int64_t count, float* out);

  // x[batch, rows], features [k0, k1) -> tile t.
  void (*tile)(Floats x, float* tiles, int64_t batch, int64_t rows, int64_t t, int64_t k0, int64_t k1);
  // y[tile t, units u0..u1] = tile @ W. Reads each entry's row, adds to its unit. Values may be bfloat16 if the batch is
  // one row. This and the next two return false if the pattern points outside of its arrays; the result is then undefined.
  bool (*gather)(const Pattern& p, const float* tiles, Floats values, Floats y, int64_t batch, int64_t t, int64_t u0,
                 int64_t u1);
  // dx[slice, rows of one block] = dy @ W^T, for SLICE * lanes batch rows. Reads each entry's unit, adds to its row: faster
  // for height >= 4, where one load and one store of the row serve several products.
  bool (*scatter)(const Pattern& p, const float* dy_tiles, const float* values, Floats dx, int64_t batch, int64_t slice,
                  int64_t block);
  // dvalues of the segments of units u0..u1 in one block, summed over all tiles.
  bool (*dots)(const Pattern& p, const float* x_tiles, const float* dy_tiles, float* dvalues, int64_t batch,
               int64_t block, int64_t u0, int64_t u1);

  // One row of planes, of one group of `lanes` images.
  void (*planes)(const Planes& p, Floats x, float* out, int64_t group, int64_t row);
  // Row y of one group, pixels [span * SPAN ...), units u0..u1; (u1 - u0) * pixels * lanes <= ROW_BUFFER.
  void (*read)(const Reader& r, const float* planes, const float* values, Floats out, int64_t group, int64_t y,
               int64_t span, int64_t u0, int64_t u1);
  // dvalues of the segments of units u0..u1 in one block. `sums` is scratch: lanes * (entries + 8) floats.
  void (*dots_planes)(const Reader& r, const float* planes, const Planes& g, const float* dy_planes, float* dvalues,
                      int64_t block, int64_t u0, int64_t u1, float* sums);

  // `rounds` rounds of multiply-adds in registers, for measuring the peak. Returns their floating-point operations.
  int64_t (*spin)(int64_t rounds, float* out);
};

// Products of bfloat16 activations and weights of several batch rows. Tiles of bfloat16 are whole: TILE batch rows to each
// feature, in an order of their own. `scatter` is for runs, in slices of HALF_SLICE rows. Those of convolutions are for
// bfloat16 images only, `lanes` side by side; all else is as in Kernels.
struct HalfKernels {
  int64_t lanes;
  bool (*sound)(const uint16_t* indices, const int32_t* starts, int64_t count, int64_t entries, int64_t bound);
  void (*tile)(const uint16_t* x, uint16_t* tiles, int64_t batch, int64_t features, int64_t t, int64_t k0, int64_t k1);
  bool (*gather)(const Pattern& p, const uint16_t* tiles, const uint16_t* values, Half* y, int64_t batch, int64_t t,
                 int64_t u0, int64_t u1);
  bool (*scatter)(const Pattern& p, const uint16_t* dy_tiles, const uint16_t* values, Half* dx, int64_t batch,
                  int64_t slice, int64_t block);
  bool (*dots)(const Pattern& p, const uint16_t* x_tiles, const uint16_t* dy_tiles, float* dvalues, int64_t batch,
               int64_t block, int64_t u0, int64_t u1);
  bool (*reorder)(const uint16_t* values, int64_t n, const int32_t* order, int64_t count, uint16_t* out);
  void (*planes)(const Planes& p, Floats x, uint16_t* out, int64_t group, int64_t row);
  void (*read)(const Reader& r, const uint16_t* planes, const uint16_t* values, Floats out, int64_t group, int64_t y,
               int64_t span, int64_t u0, int64_t u1);
  void (*dots_planes)(const Reader& r, const uint16_t* planes, const Planes& g, const uint16_t* dy_planes,
                      float* dvalues, int64_t block, int64_t u0, int64_t u1, float* sums);
};

extern "C" {
extern const Kernels rigl_portable;
#ifdef RIGL_X86
extern const HalfKernels rigl_half;
extern const HalfKernels rigl_half_wide;  // the same code in AVX2 instructions: for tests only
extern const Kernels rigl_avx2;
extern const Kernels rigl_avx2_wide;  // the code of avx512 (16 lanes) in AVX2 instructions: for tests only
extern const Kernels rigl_avx512;
#endif
}

// Pixels of a task: at most SPAN, in whole phases.
static inline int64_t span_of(int64_t phase) { return phase > SPAN ? phase : SPAN / phase * phase; }
static inline int64_t tile_count(int64_t batch) { return (batch + TILE - 1) / TILE; }
// Of one group.
static inline int64_t own_channels(const Reader& r) { return r.channels / r.groups; }
static inline int64_t own_units(const Reader& r) { return r.units / r.groups; }
// Floats of one feature in all tiles.
static inline int64_t tiled_batch(int64_t batch, int64_t lanes) {
  return batch == 1 ? 1 : batch / TILE * TILE + (batch % TILE + lanes - 1) / lanes * lanes;
}
