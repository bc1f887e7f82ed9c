// CUDA as far as rigl_jax/native/src/cuda uses it, on the host, so that tests run the kernels where there is no GPU.
//
// Blocks run one after the other. The threads of a block are fibers of one thread: each runs until it waits for the
// others of its block or warp. Warps run in an order that changes, and some lag behind, so that a barrier that is missing
// shows. Errors stop the launch, and `cudaGetLastError` tells: an index outside of a Span, a barrier that not all threads
// reach, a launch that a GPU would refuse. Shared memory of a launch holds NaN at first.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess, cudaErrorUnknown };

template <typename T>
struct Span;

namespace emulator {

enum class State { Ready, AtWarp, AtBlock, Done };

struct Fiber {
  ucontext_t context;  // where it starts
  jmp_buf at;          // where it goes on: no system call, as `swapcontext` makes two
  bool begun;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  static constexpr size_t kStack = 64 << 10;
};

inline std::mutex mutex;  // one launch at a time: shared memory is static
inline std::string error;
inline std::vector<Fiber> fibers;
inline std::vector<char> shared;
inline ucontext_t start;
inline jmp_buf scheduler;
inline int current, size;
inline uint32_t exchanged[1024];
inline void (*body)(void*);
inline void* closure;
inline std::minstd_rand order;
inline dim3 block, blocks;

inline void check(int64_t i, int64_t n) {
  if (i < 0 || i >= n)
    throw std::runtime_error("index " + std::to_string(i) + " is out of range of " + std::to_string(n));
}

inline void entry() {
  try {
    body(closure);
  } catch (const std::exception& e) {
    if (error.empty()) error = e.what();
  }
  fibers[current].state = State::Done;
  _longjmp(scheduler, 1);
}

inline void wait(State at) {
  fibers[current].state = at;
  if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}

inline void resume() {
  Fiber& f = fibers[current];
  if (_setjmp(scheduler)) return;
  if (f.begun) _longjmp(f.at, 1);
  f.begun = true;
  swapcontext(&start, &f.context);
}

// Lets fibers go on that all wait at the same barrier; false if none does.
inline bool release(int from, int to, State at) {
  for (int i = from; i < to; i++)
    if (fibers[i].state != at) return false;
  for (int i = from; i < to; i++) fibers[i].state = State::Ready;
  return true;
}

inline void run_block() {
  for (int i = 0; i < size; i++) {
    Fiber& f = fibers[i];
    f.state = State::Ready, f.begun = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = Fiber::kStack;
    makecontext(&f.context, entry, 0);
  }
  std::vector<int> warps(size / 32), lanes(32);
  std::iota(warps.begin(), warps.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  for (;;) {
    std::shuffle(warps.begin(), warps.end(), order);
    for (int warp : warps) {
      if (order() % 2) continue;  // it lags behind
      do {
        std::shuffle(lanes.begin(), lanes.end(), order);
        for (int lane : lanes) {
          current = 32 * warp + lane;
          if (fibers[current].state != State::Ready) continue;
          resume();
          if (!error.empty()) return;
        }
      } while (release(32 * warp, 32 * warp + 32, State::AtWarp));
    }
    const auto in = [](State state) {
      return std::count_if(fibers.begin(), fibers.begin() + size, [&](const Fiber& f) { return f.state == state; });
    };
    if (in(State::Done) == size) return;
    if (!in(State::Ready) && !release(0, size, State::AtBlock)) {
      error = "some threads wait at a barrier that others do not reach";
      return;
    }
  }
}

inline void run(dim3 grid, int threads, int64_t bytes, void (*f)(void*), void* arguments) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!error.empty()) return;
  if (threads < 32 || threads > 1024 || threads % 32 || bytes > 96 << 10 || grid.x < 1 || grid.x > 0x7fffffff ||
      grid.y < 1 || grid.y > 65535) {
    error = "a launch that a GPU refuses";
    return;
  }
  if (fibers.size() < (size_t)threads) fibers.resize(threads);
  size = threads, body = f, closure = arguments, blocks = grid;
  for (block.y = 0; block.y < grid.y; block.y++)
    for (block.x = 0; block.x < grid.x; block.x++) {
      shared.assign(bytes, (char)0xff);
      run_block();
      if (!error.empty()) return;
    }
}

// What another lane of the warp gave.
template <typename T>
T exchange(T mine, int other) {
  static_assert(sizeof(T) == 4);
  const int warp = current / 32 * 32;
  std::memcpy(&exchanged[current], &mine, 4);
  wait(State::AtWarp);
  std::memcpy(&mine, &exchanged[warp + other % 32], 4);
  wait(State::AtWarp);
  return mine;
}

struct Index {
  unsigned x, y;
};

}  // namespace emulator

#define threadIdx (emulator::Index{(unsigned)emulator::current, 0})
#define blockIdx (emulator::Index{emulator::block.x, emulator::block.y})
#define gridDim (emulator::Index{emulator::blocks.x, emulator::blocks.y})

template <typename T>
Span<T> dynamic_shared(int64_t size) {
  if (size * sizeof(T) > emulator::shared.size()) throw std::runtime_error("more shared memory than the launch gave");
  return {reinterpret_cast<T*>(emulator::shared.data()), size};
}

inline void __syncthreads() { emulator::wait(emulator::State::AtBlock); }

template <typename T>
T __shfl_sync(unsigned, T mine, int lane) {
  return emulator::exchange(mine, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T mine, int bits) {
  return emulator::exchange(mine, (emulator::current % 32) ^ bits);
}

inline unsigned __ballot_sync(unsigned, bool mine) {
  const int warp = emulator::current / 32 * 32;
  emulator::exchanged[emulator::current] = mine;
  emulator::wait(emulator::State::AtWarp);
  unsigned all = 0;
  for (int i = 0; i < 32; i++) all |= (unsigned)emulator::exchanged[warp + i] << i;
  emulator::wait(emulator::State::AtWarp);
  return all;
}

inline uint32_t atomicAdd(uint32_t* to, uint32_t n) {
  *to += n;
  return *to - n;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, int64_t shared, cudaStream_t, A... arguments) {
  auto call = [&] { kernel(arguments...); };
  emulator::run(grid, threads, shared, [](void* f) { (*static_cast<decltype(call)*>(f))(); }, &call);
}

struct cudaFuncAttributes {};

template <typename F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, F) {
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return emulator::error.empty() ? cudaSuccess : cudaErrorUnknown; }
inline const char* cudaGetErrorString(cudaError_t) {  // tells once
  static std::string told;
  told = std::exchange(emulator::error, "");
  return told.c_str();
}
