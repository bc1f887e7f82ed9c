// Runs `parallel` many times and ends with 1, after a line that says why, if a task is lost, run twice, or run late.
#include "parallel.h"

#include <cstdio>
#include <cstdlib>
#include <random>

namespace {

#define EXPECT(condition)                                         \
  if (!(condition)) {                                             \
    std::printf("line %d: not so: %s\n", __LINE__, #condition);   \
    std::exit(1);                                                 \
  }

constexpr int64_t TINY = 1000, LITTLE = 100'000, MUCH = 10'000'000;

// One call; its tasks may start another one, as XLA's threads do.
void call(Workers& workers, std::mt19937& random, int depth) {
  xla::ffi::ThreadPool pool{&workers};
  const int64_t sizes[] = {TINY, LITTLE, MUCH}, operations = sizes[random() % 3], count = random() % 40;
  std::vector<std::atomic<int>> runs(count);
  std::atomic<bool> open{true};
  const uint32_t seed = random();
  parallel(pool, count, operations, [&](int64_t task) {
    EXPECT(open && 0 <= task && task < count);
    if (seed % 8 == 0 && task == count - 1) std::this_thread::sleep_for(std::chrono::microseconds(20));  // the others end
    runs[task]++;
    if (depth > 0 && task == 1) {
      std::mt19937 own(seed);
      call(workers, own, depth - 1);
    }
  });
  open = false;
  for (auto& ran : runs) EXPECT(ran == 1);
}

void callers(Mode mode, int threads, int calls) {
  Workers workers(mode);
  std::vector<std::thread> all;
  for (int t = 0; t < threads; t++)
    all.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int i = 0; i < calls; i++) call(workers, random, 2);
    });
  for (std::thread& thread : all) thread.join();
  workers.release();  // of jobs that are done
}

// How many of `calls` calls of little work, one just after the other, were shared.
int64_t shared(Mode mode, int64_t calls) {
  Workers workers(mode);
  xla::ffi::ThreadPool pool{&workers};
  std::atomic<int64_t> sum{0};
  for (int64_t i = 0; i < calls; i++)
    parallel(pool, 4, LITTLE, [&](int64_t task) {
      for (int wait = 0; wait < 50; wait++) relax();  // longer than to look at the clock
      sum += task;
    });
  EXPECT(sum == calls * 6);
  workers.release();
  return workers.scheduled / 3;
}

}  // namespace

int main() {
  for (Mode mode : {Mode::THREADS, Mode::INLINE}) callers(mode, 4, 2000);
  callers(Mode::HELD, 1, 2000);
  // Workers that are in time are asked again, those that never are hardly ever.
  const int64_t calls = 20'000, in_time = shared(Mode::INLINE, calls), never = shared(Mode::HELD, calls);
  std::printf("shared of %d calls: %d with workers in time, %d without\n", (int)calls, (int)in_time, (int)never);
  EXPECT(in_time > calls / 2 && never < calls / 50);
}
