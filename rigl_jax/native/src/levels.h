// The choice of the instruction-set level of a call.
#pragma once
#include "kernels.h"

enum { LEVELS = 5 };

// Level i, or null where this build or this processor does not have it. 0 portable, 1 avx2, 2 avx2_wide, 3 avx512, 4
// avx512_bf16: the kernels of avx512, and those of `half_level`.
inline const Kernels* level_at(int64_t i) {
#ifdef RIGL_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (i == 1) return avx2 ? &rigl_avx2 : nullptr;
  if (i == 2) return avx2 ? &rigl_avx2_wide : nullptr;
  if (i == 3) return avx512 ? &rigl_avx512 : nullptr;
  if (i == 4) return avx512 && __builtin_cpu_supports("avx512bf16") ? &rigl_avx512 : nullptr;
#endif
  return i == 0 ? &rigl_portable : nullptr;
}

// The level with this number, or the best one for -1 (never avx2_wide, which exists to test the code of avx512).
inline const Kernels* level(int64_t asked) {
  if (asked >= 0) return level_at(asked);
  static const Kernels* best = level_at(3) ? level_at(3) : level_at(1) ? level_at(1) : level_at(0);
  return best;
}

// The products in bfloat16 of the level with this number, or of the best one; null where it has none.
inline const HalfKernels* half_level(int64_t asked) {
#ifdef RIGL_X86
  if (asked == 2) return level_at(2) ? &rigl_half_wide : nullptr;
  if (asked == 4 || asked == -1) return level_at(4) ? &rigl_half : nullptr;
#endif
  return nullptr;
}
