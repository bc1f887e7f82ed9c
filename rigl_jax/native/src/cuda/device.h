// What the kernels share: arrays with a length, numbers of 16 bits, exchanges within a warp, launches.
//
// Device code uses nothing of CUDA but what is here and in `emulator.h` of the tests, which runs the same sources on the
// host (RIGL_EMULATED) and checks there every index of a Span.
#pragma once
#include <cstdint>
#ifdef RIGL_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif

template <typename T>
struct Span {
  T* data = nullptr;
  int64_t size = 0;

  __device__ T& operator[](int64_t i) const {
#ifdef RIGL_EMULATED
    emulator::check(i, size);
#endif
    return data[i];
  }
};

// An array in shared memory whose length is known when it is compiled.
template <typename T, int N>
struct Fixed {
  T data[N];

  __device__ T& operator[](int i) {
#ifdef RIGL_EMULATED
    emulator::check(i, N);
#endif
    return data[i];
  }
};

constexpr int kShared = 96 << 10;  // bytes of shared memory that a block may ask for at launch, since Ampere

#ifndef RIGL_EMULATED
// The memory that the launch asked for.
template <typename T>
__device__ Span<T> dynamic_shared(int64_t size) {
  extern __shared__ uint4 shared_memory[];
  return {reinterpret_cast<T*>(shared_memory), size};
}

template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, int64_t shared, cudaStream_t stream, A... arguments) {
  if (shared > 48 << 10)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  kernel<<<grid, threads, shared, stream>>>(arguments...);
}
#endif

constexpr unsigned kAll = 0xffffffffu;  // the lanes of a warp

struct Bf16 {
  uint16_t bits;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
// To the nearest, ties to even.
template <>
__device__ inline Bf16 from_float<Bf16>(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

__device__ inline float not_a_number() { return __uint_as_float(0x7fc00000u); }
