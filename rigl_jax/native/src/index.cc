// Functions that Python calls through ctypes: they make, and check, the arrays of a pattern.
#include <cstring>
#include <memory>
#include <new>

#include "kernels.h"

namespace {

// The nonzeros of a matrix [channels * taps, units] in two orders: by (row / block, unit), then by row; and by
// (unit * taps + tap) / block_t and channel, then by tap and unit.
struct Orders {
  int64_t taps, channels, units, block, block_t;

  int64_t rows() const { return channels * taps; }
  int64_t segments() const { return (rows() + block - 1) / block * units; }
  int64_t segments_t() const { return (units * taps + block_t - 1) / block_t * channels; }

  // Whether all numbers fit their types.
  bool fit() const {
    const int64_t most = INT32_MAX, widest = 1 << 16;
    if (taps < 1 || taps > widest || channels < 0 || channels > most || units < 0 || units > most) return false;
    if (block < 1 || block > widest || block_t < 1 || block_t > widest || block_t % taps) return false;
    if (rows() > most || units * taps > most) return false;
    const auto fits = [&](int64_t blocks, int64_t each) { return !each || blocks < most / each; };
    return fits((rows() + block - 1) / block, units) && fits((units * taps + block_t - 1) / block_t, channels);
  }
};

// Where a nonzero is in the two orders.
struct Place {
  int64_t segment, index, segment_t, index_t;
};

// f(place) for every nonzero, given as ascending positions row * units + unit; false where they are no such positions.
template <typename F>
bool walk(const Orders& o, const int64_t* entries, int64_t n, const F& f) {
  const int64_t size = o.rows() * o.units, span = o.block_t / o.taps;  // units of a block of the second order
  int64_t before = -1, row_start = 0, row_end = 0, block_start = 0;
  Place at{}, row{};
  for (int64_t i = 0; i < n; i++) {
    const int64_t entry = entries[i];
    if (entry <= before || entry >= size) return false;
    before = entry;
    if (entry >= row_end) {
      const int64_t r = entry / o.units;
      row_start = r * o.units, row_end = row_start + o.units, block_start = 0;
      row = {r / o.block * o.units, r % o.block, r / o.taps, r % o.taps};
    }
    const int64_t unit = entry - row_start;
    if (unit - block_start >= span) {
      row.segment_t += (unit - block_start) / span * o.channels;
      block_start = unit / span * span;
    }
    at = {row.segment + unit, row.index, row.segment_t, (unit - block_start) * o.taps + row.index_t};
    f(at);
  }
  return true;
}

void sum_up(int32_t* starts, int64_t segments) {
  for (int64_t s = 0; s < segments; s++) starts[s + 1] += starts[s];
}

// A copy of so many numbers; null without memory.
std::unique_ptr<int32_t[]> copied(const int32_t* numbers, int64_t n) {
  std::unique_ptr<int32_t[]> copy(new (std::nothrow) int32_t[n]);
  if (copy && n) std::memcpy(copy.get(), numbers, n * sizeof(int32_t));
  return copy;
}

// Whether starts ascend from 0 to a number of entries within `capacity`, after which there is only padding.
bool segmented(const int32_t* starts, int64_t segments, const uint16_t* indices, int64_t capacity) {
  if (starts[0] != 0) return false;
  for (int64_t s = 0; s < segments; s++)
    if (starts[s + 1] < starts[s]) return false;
  if (starts[segments] > capacity) return false;
  for (int64_t i = starts[segments]; i < capacity; i++)
    if (indices[i] != kPadding) return false;
  return true;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Ascending positions -> the arrays of a pattern, without padding. indices_t may be null: then there is one order. Starts
// are one longer than their segments, the other arrays have n entries. Returns 0; 1 where the positions are no such
// positions or a number does not fit its type, 2 without memory; the arrays then hold nothing of use.
int32_t rigl_index(int64_t n, const int64_t* entries, int64_t taps, int64_t channels, int64_t units, int64_t block,
                   int64_t block_t, uint16_t* indices, int32_t* starts, uint16_t* indices_t, int32_t* starts_t,
                   int32_t* order_t) {
  const Orders o{taps, channels, units, block, block_t};
  if (n < 0 || n > INT32_MAX || !o.fit()) return 1;
  const bool both = indices_t != nullptr;
  std::memset(starts, 0, (o.segments() + 1) * sizeof(int32_t));
  if (both) std::memset(starts_t, 0, (o.segments_t() + 1) * sizeof(int32_t));
  if (!walk(o, entries, n, [&](const Place& at) {
        starts[at.segment + 1]++;
        if (both) starts_t[at.segment_t + 1]++;
      }))
    return 1;
  sum_up(starts, o.segments());
  if (both) sum_up(starts_t, o.segments_t());
  const auto next = copied(starts, o.segments()), next_t = copied(starts_t, both ? o.segments_t() : 0);
  if (!next || !next_t) return 2;
  walk(o, entries, n, [&](const Place& at) {
    const int32_t position = next[at.segment]++;
    indices[position] = (uint16_t)at.index;
    if (!both) return;
    const int32_t other = next_t[at.segment_t]++;
    indices_t[other] = (uint16_t)at.index_t;
    order_t[other] = position;
  });
  return 0;
}

// 1 if the arrays, with room for `capacity` entries, are those that rigl_index makes of some positions, else 0; 2 without
// memory.
int32_t rigl_is_index(int64_t capacity, int64_t taps, int64_t channels, int64_t units, int64_t block, int64_t block_t,
                      const uint16_t* indices, const int32_t* starts, const uint16_t* indices_t,
                      const int32_t* starts_t, const int32_t* order_t) {
  const Orders o{taps, channels, units, block, block_t};
  if (capacity < 0 || capacity > INT32_MAX || !o.fit() || !segmented(starts, o.segments(), indices, capacity)) return 0;
  const int64_t n = starts[o.segments()];
  struct Entry {
    int32_t row, unit;
  };
  const std::unique_ptr<Entry[]> entries(new (std::nothrow) Entry[n]);
  if (!entries) return 2;
  for (int64_t first = 0, s = 0; first < o.rows(); first += o.block)
    for (int64_t unit = 0; unit < o.units; unit++, s++)
      for (int64_t i = starts[s], before = -1; i < starts[s + 1]; i++) {
        const int64_t index = indices[i];
        if (index <= before || index >= o.block || first + index >= o.rows()) return 0;
        entries[i] = {(int32_t)(first + index), (int32_t)unit};
        before = index;
      }
  if (!indices_t) return 1;
  if (!segmented(starts_t, o.segments_t(), indices_t, capacity) || starts_t[o.segments_t()] != n) return 0;
  for (int64_t i = n; i < capacity; i++)
    if (order_t[i] != i) return 0;
  // Places ascend in each segment, each once, so no two have the same entry.
  for (int64_t first = 0, s = 0; first < o.units * o.taps; first += o.block_t)
    for (int64_t channel = 0; channel < o.channels; channel++, s++)
      for (int64_t i = starts_t[s], before = -1; i < starts_t[s + 1]; i++) {
        const uint32_t place = (uint32_t)(first + indices_t[i]), taps = (uint32_t)o.taps;
        const int64_t unit = place / taps, tap = place % taps;
        const int64_t key = tap * o.units + unit, own = order_t[i];
        if (indices_t[i] >= o.block_t || unit >= o.units || key <= before || own < 0 || own >= n) return 0;
        if (entries[own].row != channel * o.taps + tap || entries[own].unit != unit) return 0;
        before = key;
      }
  return 1;
}
}
#pragma GCC visibility pop
