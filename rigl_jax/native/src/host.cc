// Functions that Python calls through ctypes: the list of levels, and the measurement of the best one.
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
}
#pragma GCC visibility pop
