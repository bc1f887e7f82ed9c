// The k highest of n scores, exactly: topology.select, in the same order and with the same ties.
//
// A sample gives a bracket for the k-th score. One pass counts the scores above the bracket and on its ends (ties may
// be many) and collects those within, a few percent. The k-th is found among them, and a second pass writes the mask.
// If the k-th is outside of the bracket, the bracket is extended to all scores.
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "handlers.h"

namespace {

constexpr int32_t kOut = std::numeric_limits<int32_t>::min();  // not a candidate
constexpr int32_t kLowest = kOut + 1, kHighest = std::numeric_limits<int32_t>::max();
constexpr int64_t kSample = 4096, kTask = 1 << 16, kPart = 2048;  // kPart keys stay in the L1 cache

// These loops are compiled twice; the loader takes the best version that the processor has.
#if defined(RIGL_X86) && defined(__GNUC__) && defined(__ELF__)
#define CLONES __attribute__((target_clones("avx2", "default"), noinline))
#else
#define CLONES
#endif

// Scores as integers of the same order: +inf, ..., 0 and -0, ..., -inf, NaN, and last those that are not candidates.
CLONES void keys_of(const float* scores, const uint8_t* among, int64_t n, int32_t* keys) {
  for (int64_t i = 0; i < n; i++) {
    int32_t bits;
    std::memcpy(&bits, scores + i, sizeof bits);
    const int32_t magnitude = bits & 0x7fffffff, sign = bits >> 31;
    keys[i] = magnitude > 0x7f800000 ? kLowest : (magnitude ^ sign) - sign;
  }
  if (among)
    for (int64_t i = 0; i < n; i++) {
      const int32_t in = -(int32_t)among[i];
      keys[i] = (keys[i] & in) | (kOut & ~in);
    }
}

CLONES int64_t count_above(const int32_t* keys, int64_t n, int32_t bound) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; i++) count += keys[i] > bound;
  return count;
}

CLONES void take_above(const int32_t* keys, int64_t n, int32_t bound, bool* taken) {
  for (int64_t i = 0; i < n; i++) taken[i] = keys[i] > bound;
}

CLONES int64_t count_equal(const int32_t* keys, int64_t n, int32_t to) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; i++) count += keys[i] == to;
  return count;
}

struct Bracket {
  int32_t low, high;
};

CLONES void within(const int32_t* keys, int64_t n, Bracket b, uint8_t* is) {
  for (int64_t i = 0; i < n; i++) is[i] = (keys[i] > b.low) & (keys[i] < b.high);
}

// Appends the keys strictly within the bracket. They are few, so eight at a time are skipped.
void collect(const int32_t* keys, int64_t n, Bracket b, std::vector<int32_t>& found) {
  uint8_t is[kPart + 8] = {};
  within(keys, n, b, is);
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, is + i, 8);
    if (!eight) continue;
    for (int64_t j = i; j < i + 8; j++)
      if (is[j]) found.push_back(keys[j]);
  }
}

struct Group {
  const float* scores;
  const uint8_t* among;  // 0 or 1 each; or null: all
  bool* taken;
  int64_t n;
};

// Runs f(task, its first score, keys, number of keys) for the parts of every task.
template <typename F>
void for_parts(ffi::ThreadPool& pool, const Group& g, const F& f) {
  parallel(pool, (g.n + kTask - 1) / kTask, 2 * g.n, [&](int64_t task) {
    int32_t keys[kPart];
    for (int64_t i = task * kTask, end = std::min(g.n, i + kTask); i < end; i += kPart) {
      const int64_t size = std::min(kPart, end - i);
      keys_of(g.scores + i, g.among ? g.among + i : nullptr, size, keys);
      f(task, i, keys, size);
    }
  });
}

// Two keys with the k-th highest most likely between them.
Bracket bracket(const Group& g, int64_t k) {
  const int64_t size = std::min(g.n, kSample);
  std::vector<int32_t> sample(size);
  for (int64_t i = 0; i < size; i++) {
    const int64_t from = (int64_t)((double)i / size * g.n);
    keys_of(g.scores + from, g.among ? g.among + from : nullptr, 1, &sample[i]);
  }
  const double share = std::min(1.0, (double)k / g.n);
  const int64_t rank = (int64_t)(share * size), margin = 2 + (int64_t)(3.5 * std::sqrt(size * share * (1 - share)));
  const auto at = [&](int64_t i) {
    std::nth_element(sample.begin(), sample.begin() + i, sample.end(), std::greater<>());
    return std::max(sample[i], kLowest);
  };
  return {rank + margin < size ? at(rank + margin) : kLowest,
          rank - margin >= 0 ? at(rank - margin) : kHighest};
}

// The counts and keys that a task found for a bracket.
struct Found {
  int64_t above = 0, high = 0, low = 0;
  std::vector<int32_t> inside;
};

// The k-th highest key, and how many of the scores with this key are taken.
struct Threshold {
  int32_t key;
  int64_t need;
};

// Afterwards `b` is the bracket that contains it, and `tasks` what each task found.
Threshold kth(ffi::ThreadPool& pool, const Group& g, int64_t k, Bracket& b, std::vector<Found>& tasks) {
  for (;; b = {kLowest, kHighest}) {
    for_parts(pool, g, [&](int64_t task, int64_t first, const int32_t* keys, int64_t size) {
      Found& found = tasks[task];
      if (first == task * kTask) found = {};
      found.above += count_above(keys, size, b.high);
      found.high += count_equal(keys, size, b.high);
      if (b.low != b.high) found.low += count_equal(keys, size, b.low);
      collect(keys, size, b, found.inside);
    });
    int64_t need = k, high = 0, low = 0;
    std::vector<int32_t> inside;
    for (const Found& found : tasks) {
      need -= found.above, high += found.high, low += found.low;
      inside.insert(inside.end(), found.inside.begin(), found.inside.end());
    }
    if (need < 1) continue;
    if (need <= high) return {b.high, need};
    need -= high;
    if (need <= (int64_t)inside.size()) {
      std::nth_element(inside.begin(), inside.begin() + (need - 1), inside.end(), std::greater<>());
      const int32_t key = inside[need - 1];
      for (int64_t i = 0, end = need; i < end; i++) need -= inside[i] > key;
      return {key, need};
    }
    need -= inside.size();
    if (need <= low) return {b.low, need};
    if (b.low == kLowest) return {kOut, 0};  // k is more than all candidates
  }
}

void select(ffi::ThreadPool& pool, const Group& g, int64_t k) {
  if (k <= 0) {
    std::memset(g.taken, 0, g.n);
    return;
  }
  std::vector<Found> tasks((g.n + kTask - 1) / kTask);
  Bracket b = bracket(g, k);
  auto [key, need] = kth(pool, g, k, b, tasks);
  const int32_t threshold = key;
  // The number of ties that each task takes; they go to the lower index.
  std::vector<int64_t> ties;
  for (const Found& found : tasks) {
    const int64_t within = std::count(found.inside.begin(), found.inside.end(), threshold);
    ties.push_back(std::min(need, threshold == b.high ? found.high : threshold == b.low ? found.low : within));
    need -= ties.back();
  }
  for_parts(pool, g, [&](int64_t task, int64_t first, const int32_t* keys, int64_t size) {
    bool* taken = g.taken + first;
    take_above(keys, size, threshold, taken);
    for (int64_t i = 0; i < size && ties[task] > 0; i++)
      if (keys[i] == threshold) taken[i] = true, ties[task]--;
  });
}

// scores[..., n], among[..., n] or [0] for all, k[...] -> taken[..., n].
ffi::Error Select(ffi::ThreadPool pool, F32 scores, ffi::Buffer<ffi::PRED> among, S32 k,
                  ffi::ResultBuffer<ffi::PRED> taken) {
  const bool all = among.element_count() == 0, scalar = scores.dimensions().size() == 0;
  const int64_t groups = k.element_count(), n = scalar ? 1 : scores.dimensions().back(), size = scores.element_count();
  if (times({n, groups}) != size || (int64_t)taken->element_count() != size ||
      (!all && (int64_t)among.element_count() != size))
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "rigl_jax: sizes of scores, candidates and counts differ");
  for (int64_t i = 0; i < groups; i++)
    select(pool, {scores.typed_data() + i * n, all ? nullptr : (const uint8_t*)among.typed_data() + i * n,
                  taken->typed_data() + i * n, n}, k.typed_data()[i]);
  return ffi::Error::Success();
}

}  // namespace

// clang-format off
#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_select, Select, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<F32>().Arg<ffi::Buffer<ffi::PRED>>().Arg<S32>().Ret<ffi::Buffer<ffi::PRED>>());
#pragma GCC visibility pop
