// The k highest of n scores, exactly: topology.select, in the same order and with the same ties.
//
// A sample gives a bracket for the k-th score. One pass counts the scores above the bracket and on its ends (ties may
// be many) and collects those within, a few percent. The k-th is found among them, and a second pass takes what is
// above. If the k-th is outside of the bracket, the bracket is extended to all scores.
#pragma once
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "handlers.h"

namespace {

constexpr int32_t kOut = std::numeric_limits<int32_t>::min();  // not a candidate
constexpr int32_t kLowest = kOut + 1, kHighest = std::numeric_limits<int32_t>::max();
constexpr int32_t kInfinite = 0x7f800000;
constexpr int64_t kSample = 4096, kTask = 1 << 16, kPart = 2048;  // kPart keys stay in the L1 cache

// Loops that are compiled twice; the loader takes the best version that the processor has. Clang refuses both attributes
// on one function.
#if defined(RIGL_X86) && defined(__ELF__) && defined(__clang__)
#define CLONES __attribute__((target_clones("avx2", "default")))
#define WIDE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#elif defined(RIGL_X86) && defined(__ELF__) && defined(__GNUC__)
#define CLONES __attribute__((target_clones("avx2", "default"), noinline))
#define WIDE_CLONES __attribute__((target_clones("avx512f", "avx2", "default"), noinline))
#else
#define CLONES
#define WIDE_CLONES
#endif

// Scores as integers of the same order: +inf, ..., 0 and -0, ..., -inf, NaN. `signs` is -1, or 0 to rank magnitudes.
inline int32_t key_of(float score, int32_t signs) {
  int32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  const int32_t magnitude = bits & 0x7fffffff, sign = (bits >> 31) & signs;
  return magnitude > kInfinite ? kLowest : (magnitude ^ sign) - sign;
}

CLONES void keys_of(const float* scores, int64_t n, int32_t signs, int32_t* keys) {
  for (int64_t i = 0; i < n; i++) keys[i] = key_of(scores[i], signs);
}

// Scores whose byte, 0 or 1, has a value.
struct Among {
  const uint8_t* bytes = nullptr;
  uint8_t value = 1;
};

inline uint32_t turned(uint32_t x, int bits) { return x << bits | x >> (32 - bits); }

// Draws [first, first + n) of jax.random.uniform with a key of Threefry 2x32 (Salmon et al. 2011, 20 rounds), as
// integers below 2^23 in their order: draw i is the hash of its own number.
WIDE_CLONES void draw(const uint32_t* key, int64_t first, int64_t n, int32_t* keys) {
  const uint32_t k[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1bd11bda};
  for (int64_t i = 0; i < n; i++) {
    const uint64_t number = (uint64_t)(first + i);
    uint32_t a = (uint32_t)(number >> 32) + k[0], b = (uint32_t)number + k[1];
#pragma GCC unroll 5
    for (int group = 0; group < 5; group++) {
      const int odd = group % 2;
      a += b, b = turned(b, odd ? 17 : 13) ^ a;
      a += b, b = turned(b, odd ? 29 : 15) ^ a;
      a += b, b = turned(b, odd ? 16 : 26) ^ a;
      a += b, b = turned(b, odd ? 24 : 6) ^ a;
      a += k[(group + 1) % 3], b += k[(group + 2) % 3] + group + 1;
    }
    keys[i] = (int32_t)((a ^ b) >> 9);
  }
}

// 1 is added to the draws that do not come late.
CLONES void put_first(const uint8_t* late, int64_t n, int32_t* keys) {
  for (int64_t i = 0; i < n; i++) keys[i] += late[i] ? 0 : 1 << 23;
}

// Other scores do not compete.
CLONES void restrict_to(Among among, int64_t first, int64_t n, int32_t* keys) {
  const uint8_t* const bytes = among.bytes + first;
  for (int64_t i = 0; i < n; i++) {
    const int32_t is = -(int32_t)(bytes[i] == among.value);
    keys[i] = (keys[i] & is) | (kOut & ~is);
  }
}

// -inf for these. NaN and +inf stay, to be found.
CLONES void put_last(Among dropped, int64_t first, int64_t n, int32_t* keys) {
  const uint8_t* const bytes = dropped.bytes + first;
  for (int64_t i = 0; i < n; i++) {
    const int32_t finite = (keys[i] != kLowest) & (keys[i] != kInfinite);
    const int32_t is = -(int32_t)((bytes[i] == dropped.value) & finite);
    keys[i] = (keys[i] & ~is) | (-kInfinite & is);
  }
}

CLONES void take_above(const int32_t* keys, int64_t n, int32_t bound, bool* taken) {
  for (int64_t i = 0; i < n; i++) taken[i] = keys[i] > bound;
}

struct Bracket {
  int32_t low, high;
};

// Of keys: how many are above a bracket and on its ends, and how many are NaN or +inf (-inf can be ranked).
struct Counts {
  int64_t above = 0, high = 0, low = 0, unsound = 0;
};

// Adds to the counts; `inside` says which keys are strictly within the bracket.
CLONES void examine(const int32_t* keys, int64_t n, Bracket b, Counts& counts, uint8_t* inside) {
  int32_t above = 0, high = 0, low = 0, unsound = 0;
  for (int64_t i = 0; i < n; i++) {
    const int32_t key = keys[i];
    above += key > b.high, high += key == b.high, low += key == b.low;
    unsound += (key == kLowest) | (key == kInfinite);
    inside[i] = (key > b.low) & (key < b.high);
  }
  counts.above += above, counts.high += high, counts.unsound += unsound;
  counts.low += b.low == b.high ? 0 : low;
}

// Appends keys[i] where inside[i] is 1. They are few, so eight at a time are skipped. `inside` has 8 bytes more, 0.
void collect(const int32_t* keys, int64_t n, const uint8_t* inside, std::vector<int32_t>& found) {
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, inside + i, 8);
    for (int64_t j = i; eight; j++, eight >>= 8)
      if (eight & 1) found.push_back(keys[j]);
  }
}

// What is ranked: scores, or uniform draws.
struct Group {
  const float* scores;
  int64_t n;
  bool magnitudes = false;         // whether |scores| are ranked
  Among among = {};                // which compete; null: all
  Among dropped = {};              // of which the finite scores are taken as -inf; null: of none
  const uint32_t* draws = nullptr;  // key of the draws; null: scores
  const uint8_t* late = nullptr;   // which draws rank after all others; null: none
};

void keys_at(const Group& g, int64_t first, int64_t size, int32_t* keys) {
  if (g.draws) {
    draw(g.draws, first, size, keys);
    if (g.late) put_first(g.late + first, size, keys);
  } else {
    keys_of(g.scores + first, size, g.magnitudes ? 0 : -1, keys);
  }
  if (g.dropped.bytes) put_last(g.dropped, first, size, keys);
  if (g.among.bytes) restrict_to(g.among, first, size, keys);
}

// Runs f(task, its first score, keys, number of keys) for the parts of every task.
template <typename F>
void for_parts(ffi::ThreadPool& pool, const Group& g, const F& f) {
  parallel(pool, (g.n + kTask - 1) / kTask, 2 * g.n, [&](int64_t task) {
    int32_t keys[kPart];
    for (int64_t i = task * kTask, end = std::min(g.n, i + kTask); i < end; i += kPart) {
      const int64_t size = std::min(kPart, end - i);
      keys_at(g, i, size, keys);
      f(task, i, keys, size);
    }
  });
}

// Two keys with the k-th highest most likely between them.
Bracket bracket(const Group& g, int64_t k) {
  const int64_t size = std::min(g.n, std::clamp(g.n / 16, kSample / 16, kSample));
  std::vector<int32_t> sample(size);
  for (int64_t i = 0; i < size; i++) keys_at(g, (int64_t)((double)i / size * g.n), 1, &sample[i]);
  const double share = std::clamp((double)k / g.n, 0.0, 1.0);
  const int64_t rank = (int64_t)(share * size), margin = 2 + (int64_t)(3.5 * std::sqrt(size * share * (1 - share)));
  const auto at = [&](int64_t i) {
    std::nth_element(sample.begin(), sample.begin() + i, sample.end(), std::greater<>());
    return std::max(sample[i], kLowest);
  };
  return {rank + margin < size ? at(rank + margin) : kLowest,
          rank - margin >= 0 ? at(rank - margin) : kHighest};
}

// What a task found for a bracket.
struct Found {
  Counts counts;
  std::vector<int32_t> inside;
};

std::vector<Found> find(ffi::ThreadPool& pool, const Group& g, Bracket b) {
  std::vector<Found> tasks((g.n + kTask - 1) / kTask);
  for_parts(pool, g, [&](int64_t task, int64_t, const int32_t* keys, int64_t size) {
    uint8_t inside[kPart + 8] = {};
    examine(keys, size, b, tasks[task].counts, inside);
    collect(keys, size, inside, tasks[task].inside);
  });
  return tasks;
}

// The scores that are taken: those above a key, and of those that are equal to it so many in each task.
struct Cut {
  int32_t key = kHighest;
  std::vector<int64_t> ties;
  bool sound = true;
};

bool all_sound(const std::vector<Found>& tasks) {
  return std::all_of(tasks.begin(), tasks.end(), [](const Found& found) { return !found.counts.unsound; });
}

// The k-th highest key and how many of the scores with this key are taken, 0 if it is not in the bracket.
struct Kth {
  int32_t key = kOut;
  int64_t need = 0;
};

Kth kth_within(const std::vector<Found>& tasks, Bracket b, int64_t k) {
  int64_t high = 0, low = 0;
  std::vector<int32_t> inside;
  for (const Found& found : tasks) {
    k -= found.counts.above, high += found.counts.high, low += found.counts.low;
    inside.insert(inside.end(), found.inside.begin(), found.inside.end());
  }
  if (k < 1) return {};
  if (k <= high) return {b.high, k};
  k -= high;
  if (k <= (int64_t)inside.size()) {
    std::nth_element(inside.begin(), inside.begin() + (k - 1), inside.end(), std::greater<>());
    const int32_t key = inside[k - 1];
    for (int64_t i = 0, end = k; i < end; i++) k -= inside[i] > key;
    return {key, k};
  }
  k -= inside.size();
  return k <= low ? Kth{b.low, k} : Kth{};
}

// The k highest; all candidates where they are fewer.
Cut highest(ffi::ThreadPool& pool, const Group& g, int64_t k) {
  Bracket b = bracket(g, k);
  std::vector<Found> tasks = find(pool, g, b);
  Cut cut{kHighest, std::vector<int64_t>(tasks.size()), all_sound(tasks)};
  if (k <= 0) return cut;
  Kth kth = kth_within(tasks, b, k);
  if (!kth.need) {
    b = {kLowest, kHighest};
    tasks = find(pool, g, b);
    kth = kth_within(tasks, b, k);
  }
  cut.key = kth.key;  // kOut, below all candidates, where k is more than there are
  // Ties go to the lower index.
  for (size_t task = 0; task < tasks.size(); task++) {
    const Found& found = tasks[task];
    const int64_t within = std::count(found.inside.begin(), found.inside.end(), cut.key);
    cut.ties[task] = std::min(kth.need, cut.key == b.high ? found.counts.high : cut.key == b.low ? found.counts.low : within);
    kth.need -= cut.ties[task];
  }
  return cut;
}

// f(first, taken, size) for parts of the scores.
template <typename F>
void take(ffi::ThreadPool& pool, const Group& g, Cut& cut, const F& f) {
  for_parts(pool, g, [&](int64_t task, int64_t first, const int32_t* keys, int64_t size) {
    bool taken[kPart];
    take_above(keys, size, cut.key, taken);
    for (int64_t i = 0; i < size && cut.ties[task] > 0; i++)
      if (keys[i] == cut.key) taken[i] = true, cut.ties[task]--;
    f(first, taken, size);
  });
}

}  // namespace
