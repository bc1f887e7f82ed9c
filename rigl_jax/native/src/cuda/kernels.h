// What the handlers call: each starts kernels on a stream and returns at once. Sizes are checked by the handlers.
#pragma once
#include <cstdint>
#include <vector>
#ifdef RIGL_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime_api.h>
#endif

// One array that is selected from.
struct Leaf {
  const void* scores;
  const uint8_t* among;  // 0 or 1 each; or null: all
  uint8_t* taken;
  int32_t n;      // at least 1
  int32_t first;  // the first of the blocks that work on it; set by `select`
};

enum class Scores { F32, BF16, F16 };

constexpr int kLeaves = 64;      // that one search takes
constexpr int kBlocks = 1024;    // of a search, and one a leaf
constexpr int kPerLeaf = 2053;   // words of its memory for each leaf

// The k[i] highest of each leaf, at most kLeaves of them. `work` holds kPerLeaf words a leaf and kBlocks.
cudaError_t select(cudaStream_t stream, Scores type, std::vector<Leaf> leaves, const int32_t* k, uint32_t* work);

// A pattern as in ../kernels.h: entry i of segment block * units + unit is at row block * `block` + indices[i]. Entries
// after the last segment are padding, which no product reads.
struct Matrix {
  const uint16_t* indices;
  const int32_t* starts;
  int64_t entries, rows, units, height, block;

  int64_t blocks() const { return (rows + block - 1) / block; }
};

// Whether the kernels can be loaded on this machine's GPU: not on one that is too old, nor with a driver that is.
cudaError_t usable();

// Arrays of activations are feature-major, [features, batch]; results are [batch, features]. `bad` is one word of memory.
// Heights are 1 and 16. A damaged pattern gives NaN, and never a read or a write outside of the arrays.
struct Product {
  Matrix pattern;
  const int32_t* order;  // value i is values[order[i]]; or null: as they are
  int64_t batch;
  bool bf16;  // activations and values; else f32
  uint32_t* bad;
};

cudaError_t gather(cudaStream_t stream, const Product& p, const void* x, const void* values, void* y);
cudaError_t scatter(cudaStream_t stream, const Product& p, const void* dy, const void* values, void* dx);
cudaError_t dots(cudaStream_t stream, const Product& p, const void* x, const void* dy, float* dvalues);
