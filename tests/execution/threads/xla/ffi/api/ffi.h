// Stands for XLA's header in tests of parallel.h: a pool whose threads run what is scheduled in the way that is asked for.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

enum class Mode {
  THREADS,  // at once, on threads of the pool
  INLINE,   // inside of Schedule, on the thread that calls it
  HELD,     // only in `release`: threads that start when the call has long ended
};

class Workers {
 public:
  explicit Workers(Mode mode, int threads = 3) : mode_(mode) {
    if (mode == Mode::THREADS)
      for (int i = 0; i < threads; i++) threads_.emplace_back([this] { serve(); });
  }
  ~Workers() {
    {
      std::lock_guard<std::mutex> guard(lock_);
      closed_ = true;
    }
    ready_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  void add(std::function<void()> work) {
    scheduled++;
    if (mode_ == Mode::INLINE) return work();
    {
      std::lock_guard<std::mutex> guard(lock_);
      waiting_.push_back(std::move(work));
    }
    ready_.notify_one();
  }
  void release() {
    std::vector<std::function<void()>> held;
    {
      std::lock_guard<std::mutex> guard(lock_);
      held.swap(waiting_);
    }
    for (auto& work : held) work();
  }

  std::atomic<int64_t> scheduled{0};

 private:
  void serve() {
    for (;;) {
      std::unique_lock<std::mutex> guard(lock_);
      ready_.wait(guard, [this] { return closed_ || !waiting_.empty(); });
      if (waiting_.empty()) return;
      auto work = std::move(waiting_.back());
      waiting_.pop_back();
      guard.unlock();
      work();
    }
  }

  const Mode mode_;
  std::mutex lock_;
  std::condition_variable ready_;
  std::vector<std::function<void()>> waiting_;
  std::vector<std::thread> threads_;
  bool closed_ = false;
};

namespace xla::ffi {

struct ThreadPool {
  Workers* workers;
  int64_t num_threads() const { return 4; }
  template <typename F>
  void Schedule(F&& f) {
    workers->add(std::forward<F>(f));
  }
};

}  // namespace xla::ffi
