// Divides one call among the threads of XLA, so that no second thread pool competes for the cores.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#else
static inline void relax() {}
#endif

// Nanoseconds on a clock that only runs forward.
inline int64_t now() {
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

// Each worker gets a contiguous range of the tasks [0, count), because neighbouring tasks share tiles. A worker that
// has finished its range takes tasks from the others, so a worker that starts late delays nothing.
struct Job {
  struct Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
    int64_t apart[6];  // each range in a cache line of its own
  };
  explicit Job(int64_t parts) : ranges(parts), parts(parts) {}

  std::vector<Range> ranges;
  std::atomic<int64_t> workers{0}, unfinished{0};
  const int64_t parts;
  void (*run)(const void*, int64_t) = nullptr;
  const void* context = nullptr;

  // Returns how many tasks this thread has run.
  int64_t work() {
    const int64_t own = workers.fetch_add(1) % parts;
    int64_t finished = 0;
    for (int64_t i = 0; i < parts; i++) {
      Range& range = ranges[(own + i) % parts];
      for (int64_t task; (task = range.next.fetch_add(1)) < range.end; finished++) run(context, task);
    }
    unfinished.fetch_sub(finished);
    return finished;
  }
};

// Decides, for one thread that calls `parallel`, whether to share work that takes less time than a sleeping worker needs
// to wake up. XLA's workers look for work for a while before they sleep, so sharing pays where calls follow one another
// quickly: in a loop, or from layer to layer on one example. It is tried after some such calls. Where workers are late,
// as beside other programs, it is tried again ever more rarely.
class Pace {
 public:
  bool shares() {
    start_ = now();
    if (start_ - end_ > kQuick) return sharing_ = false;
    return sharing_ = sharing_ || ++calls_ >= patience_;
  }

  void ended() { end_ = now(); }

  // After a call that was shared. `waits`: when the caller had no more to do. Only a call of little work tells whether
  // sharing such calls pays: not if no worker came, and less so if the caller waited for longer than it worked.
  void ended_shared(bool little, bool helped, int64_t waits) {
    ended();
    if (!little) {
      sharing_ = helped && patience_ == kFirst;
      return;
    }
    const bool late = end_ - waits > waits - start_;
    if (helped && !late) {
      patience_ = kFirst;
      calls_ = misses_ = 0;
    } else if ((misses_ += late ? kMisses / 2 : 1) >= kMisses) {
      patience_ = std::min(4 * patience_, kMost);
      sharing_ = false;
      calls_ = misses_ = 0;
    }
  }

 private:
  static constexpr int64_t kQuick = 5'000;            // nanoseconds between two calls
  static constexpr int64_t kFirst = 4, kMost = 1024;  // calls before sharing is tried
  static constexpr int64_t kMisses = 8;               // calls in which a worker may still be waking up
  int64_t start_ = 0, end_ = 0, calls_ = 0, misses_ = 0, patience_ = kFirst;
  bool sharing_ = false;
};

inline Pace& pace() {
  thread_local Pace pace;
  return pace;
}

// Moving a number in memory takes as long as so many multiply-adds.
constexpr int64_t MOVE = 16;

// Runs f(0) ... f(count - 1), on the calling thread alone if `operations` (multiply-adds) are too few to share them.
// The caller works too, and waits for tasks, not for threads: it may itself be a thread of the pool, and the scheduled
// workers may never start.
template <typename F>
void parallel(xla::ffi::ThreadPool& pool, int64_t count, int64_t operations, const F& f) {
  constexpr int64_t kWorthAWakeUp = 400'000, kWorthSharing = 60'000;
  const bool tiny = operations < kWorthSharing || count < 2, little = operations < kWorthAWakeUp;
  const bool alone = tiny || (little && !pace().shares());
  const int64_t parts = std::min<int64_t>(alone ? 1 : pool.num_threads(), count);
  if (parts <= 1) {
    for (int64_t i = 0; i < count; i++) f(i);
    if (!tiny) pace().ended();
    return;
  }
  auto job = std::make_shared<Job>(parts);
  job->unfinished = count;
  job->context = &f;
  job->run = [](const void* context, int64_t task) { (*static_cast<const F*>(context))(task); };
  for (int64_t i = 0; i < parts; i++) {
    job->ranges[i].next = count * i / parts;
    job->ranges[i].end = count * (i + 1) / parts;
  }
  for (int64_t i = 1; i < parts; i++) pool.Schedule([job] { job->work(); });
  const int64_t own = job->work(), waits = now();
  // Yields after a while, because the worker may be on the core of the caller.
  for (int64_t spins = 0; job->unfinished.load() > 0; spins++) spins < 300 ? relax() : std::this_thread::yield();
  pace().ended_shared(little, own < count, waits);
}
