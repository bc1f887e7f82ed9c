// Handlers that rank: the selection of the highest scores, and the rewiring of one weight.
#include "ranking.h"

namespace {

// scores[..., n], among[..., n] or [0] for all, k[...] -> taken[..., n].
ffi::Error Select(ffi::ThreadPool pool, F32 scores, ffi::Buffer<ffi::PRED> among, S32 k,
                  ffi::ResultBuffer<ffi::PRED> taken) {
  const bool all = among.element_count() == 0, scalar = scores.dimensions().size() == 0;
  const int64_t groups = k.element_count(), n = scalar ? 1 : scores.dimensions().back(), size = scores.element_count();
  if (times({n, groups}) != size || (int64_t)taken->element_count() != size ||
      (!all && (int64_t)among.element_count() != size))
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "rigl_jax: sizes of scores, candidates and counts differ");
  for (int64_t i = 0; i < groups; i++) {
    const Group g{scores.typed_data() + i * n, n, false, {all ? nullptr : (const uint8_t*)among.typed_data() + i * n}};
    bool* const out = taken->typed_data() + i * n;
    if (k.typed_data()[i] <= 0) {
      std::memset(out, 0, n);
      continue;
    }
    Cut cut = highest(pool, g, k.typed_data()[i]);
    take(pool, g, cut, [&](int64_t first, const bool* part, int64_t size) { std::memcpy(out + first, part, size); });
  }
  return ffi::Error::Success();
}

// How many of n bytes, 0 or 1 each, are 1.
CLONES int64_t count_ones(const uint8_t* bytes, int64_t n) {
  int32_t total = 0;
  for (int64_t i = 0; i < n; i++) total += bytes[i];
  return total;
}

int64_t count(ffi::ThreadPool& pool, const uint8_t* bytes, int64_t n) {
  std::atomic<int64_t> total{0};
  parallel(pool, (n + kTask - 1) / kTask, n, [&](int64_t task) {
    total += count_ones(bytes + task * kTask, std::min(kTask, n - task * kTask));
  });
  return total;
}

// What became of a weight.
enum Part : uint8_t { kNeither = 0, kKept = 1, kFresh = 2 };

// `part` is kKept or kNeither before.
CLONES void settle(const uint8_t* before, const bool* grown, int64_t n, uint8_t* mask, uint8_t* part) {
  for (int64_t i = 0; i < n; i++) {
    const uint8_t active = part[i] | grown[i];
    part[i] |= (active & ~before[i]) * kFresh;
    mask[i] = active;
  }
}

// topology.drop_and_grow of one group of single weights; a mask with unsound scores stays as it is. `mask` may be the
// memory of `old`.
void rewire(ffi::ThreadPool& pool, const uint8_t* old, Group drop, Group grow, bool regrow_dropped, int64_t n_drop,
            uint8_t* mask, uint8_t* part) {
  const int64_t n = drop.n, active = count(pool, old, n), n_kept = std::clamp<int64_t>(active - n_drop, 0, active);
  drop.among = {old, 1};
  Cut stay = highest(pool, drop, n_kept);
  take(pool, drop, stay, [&](int64_t first, const bool* kept, int64_t size) { std::memcpy(part + first, kept, size); });
  grow.among = {part, kNeither};
  if (!regrow_dropped) grow.dropped = {old, 1};
  Cut grown = highest(pool, grow, active - n_kept);
  if (!stay.sound || !grown.sound) {
    std::memcpy(part, old, n);
    std::memmove(mask, old, n);
    return;
  }
  take(pool, grow, grown, [&](int64_t first, const bool* some, int64_t size) {
    uint8_t before[kPart];
    std::memcpy(before, old + first, size);
    settle(before, some, size, mask + first, part + first);
  });
}

// old[groups..., shape...], drop as old, grow as old or, to draw scores, uint32[groups..., 2], then with late as old or
// [groups..., 0], n_drop[groups...] -> mask, which may be the memory of old, and part: what became of each weight.
ffi::Error Rewire(ffi::ThreadPool pool, ffi::Buffer<ffi::PRED> old, F32 drop, ffi::AnyBuffer grow,
                  ffi::Buffer<ffi::PRED> late, S32 n_drop, ffi::ResultBuffer<ffi::PRED> mask,
                  ffi::ResultBuffer<ffi::U8> part, int64_t drop_magnitudes, int64_t grow_magnitudes,
                  int64_t regrow_dropped) {
  const bool drawn = grow.element_type() == ffi::DataType::U32;
  if (!drawn && grow.element_type() != ffi::DataType::F32)
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "rigl_jax: scores must be float32, or a key");
  const int64_t size = old.element_count(), groups = n_drop.element_count(), n = groups ? size / groups : 0;
  const int64_t later = late.element_count();
  for (int64_t given : {times({n, groups}), (int64_t)drop.element_count(), (int64_t)mask->element_count(),
                        (int64_t)part->element_count(), drawn ? size : (int64_t)grow.element_count()})
    if (given != size) return ffi::Error(ffi::ErrorCode::kInvalidArgument, "rigl_jax: sizes of masks and scores differ");
  if ((drawn && (int64_t)grow.element_count() != times({2, groups})) || (later && (!drawn || later != size)))
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "rigl_jax: sizes of masks and draws differ");
  for (int64_t i = 0, at = 0; i < groups; i++, at += n) {
    Group growing{drawn ? nullptr : (const float*)grow.untyped_data() + at, n, grow_magnitudes != 0};
    if (drawn) growing.draws = (const uint32_t*)grow.untyped_data() + 2 * i;
    if (later) growing.late = (const uint8_t*)late.untyped_data() + at;
    rewire(pool, (const uint8_t*)old.untyped_data() + at, {drop.typed_data() + at, n, drop_magnitudes != 0}, growing,
           regrow_dropped != 0, n_drop.typed_data()[i], (uint8_t*)mask->untyped_data() + at, part->typed_data() + at);
  }
  return ffi::Error::Success();
}

}  // namespace

// clang-format off
#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_select, Select, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<F32>().Arg<ffi::Buffer<ffi::PRED>>().Arg<S32>().Ret<ffi::Buffer<ffi::PRED>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(rigl_rewire, Rewire, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<ffi::Buffer<ffi::PRED>>().Arg<F32>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::PRED>>().Arg<S32>()
    .Ret<ffi::Buffer<ffi::PRED>>().Ret<ffi::Buffer<ffi::U8>>()
    .Attr<int64_t>("drop_magnitudes").Attr<int64_t>("grow_magnitudes").Attr<int64_t>("regrow_dropped"));
#pragma GCC visibility pop
