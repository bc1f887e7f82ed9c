// Divides one call among the threads of XLA, so that no second thread pool competes for the cores.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#else
static inline void relax() {}
#endif

// Each worker gets a contiguous range of the tasks [0, count), because neighbouring tasks share tiles. A worker that
// has finished its range takes tasks from the others, so a worker that starts late delays nothing.
struct Job {
  enum { MAX_WORKERS = 64 };
  struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  Range ranges[MAX_WORKERS];
  std::atomic<int64_t> workers{0}, unfinished{0};
  int64_t parts = 1;
  void (*run)(const void*, int64_t) = nullptr;
  const void* context = nullptr;

  void work() {
    const int64_t own = workers.fetch_add(1) % parts;
    int64_t finished = 0;
    for (int64_t i = 0; i < parts; i++) {
      Range& range = ranges[(own + i) % parts];
      for (int64_t task; (task = range.next.fetch_add(1)) < range.end; finished++) run(context, task);
    }
    unfinished.fetch_sub(finished);
  }
};

// Moving a number in memory takes as long as so many multiply-adds.
constexpr int64_t MOVE = 16;

// Runs f(0) ... f(count - 1), on the calling thread alone if `operations` (multiply-adds) are too few to wake others.
// The caller works too, and waits for tasks, not for threads: it may itself be a thread of the pool, and the scheduled
// workers may never start.
template <typename F>
void parallel(xla::ffi::ThreadPool& pool, int64_t count, int64_t operations, const F& f) {
  constexpr int64_t kWorthAWakeUp = 400'000;
  const int64_t threads = operations < kWorthAWakeUp ? 1 : pool.num_threads();
  const int64_t parts = std::min<int64_t>({threads, count, Job::MAX_WORKERS});
  if (parts <= 1) {
    for (int64_t i = 0; i < count; i++) f(i);
    return;
  }
  auto job = std::make_shared<Job>();
  job->parts = parts;
  job->unfinished = count;
  job->context = &f;
  job->run = [](const void* context, int64_t task) { (*static_cast<const F*>(context))(task); };
  for (int64_t i = 0; i < parts; i++) {
    job->ranges[i].next = count * i / parts;
    job->ranges[i].end = count * (i + 1) / parts;
  }
  for (int64_t i = 1; i < parts; i++) pool.Schedule([job] { job->work(); });
  job->work();
  // Yields after a while, because the worker may be on the core of the caller.
  for (int64_t spins = 0; job->unfinished.load() > 0; spins++) spins < 300 ? relax() : std::this_thread::yield();
}
