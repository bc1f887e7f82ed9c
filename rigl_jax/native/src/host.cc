// Functions that Python calls through ctypes: the sorting for a new pattern, and the list of levels.
#include <cstring>
#include <vector>

#include "levels.h"

#pragma GCC visibility push(default)
extern "C" {

// Name of level i, or null after the last one; `available` says whether this build and processor have it.
const char* rigl_level(int64_t i, int32_t* available) {
  static const char* const names[LEVELS] = {"portable", "avx2", "avx2_wide", "avx512", "avx512_bf16"};
  if (i < 0 || i >= LEVELS) return nullptr;
  *available = level_at(i) != nullptr;
  return names[i];
}

// Keeps one thread busy with multiply-adds of the best level; returns how many floating-point operations it did.
int64_t rigl_spin(int64_t rounds) {
  float out[64];
  return level(-1)->spin(rounds, out);
}

// Sorts n entries (row, unit) by (row / block, unit), stable: the order in which the kernels stream values. Writes
// position[entry], indices[position] = row % block, and starts[blocks * unit_count + 1]. Returns 0; or 1, and writes
// nothing, if an entry is outside of the blocks and units or a number does not fit its type.
int32_t rigl_sort(int64_t n, const int32_t* rows, const int32_t* units, int64_t block, int64_t blocks,
                  int64_t unit_count, int32_t* position, uint16_t* indices, int32_t* starts) {
  int64_t segments;
  if (n < 0 || n > INT32_MAX || block < 1 || block > 1 << 16 || blocks < 0 || unit_count < 0 ||
      __builtin_mul_overflow(blocks, unit_count, &segments) || segments >= INT32_MAX)
    return 1;
  for (int64_t i = 0; i < n; i++)
    if (rows[i] < 0 || rows[i] / block >= blocks || units[i] < 0 || units[i] >= unit_count) return 1;
  std::memset(starts, 0, (segments + 1) * sizeof(int32_t));
  std::vector<int32_t> segment(n);
  for (int64_t i = 0; i < n; i++) {
    segment[i] = (int32_t)(rows[i] / block * unit_count + units[i]);
    starts[segment[i] + 1]++;
  }
  for (int64_t s = 0; s < segments; s++) starts[s + 1] += starts[s];
  std::vector<int32_t> next(starts, starts + segments);
  for (int64_t i = 0; i < n; i++) {
    position[i] = next[segment[i]]++;
    indices[position[i]] = (uint16_t)(rows[i] % block);
  }
  return 0;
}
}
#pragma GCC visibility pop
