// What a kernel is made of. The walkers take a body over memory (rows.h, columns.h), which says
// what happens to a unit. It has
//   Element, kMap, in[kInputs], out[kOutputs], mask
//   at(bin): its coefficients for a channel (rows) or for the columns of a slot
//   prefetch<kLocality>(element)
//   load(coefficients, place): its values of a unit
//   kTogether: units that are loaded together where more than one; then finish(values, how many)
//   kInPlace: an output may be an input, so what units share is loaded before it is written
// and, to sum: Accumulator, kSums, add(coefficients, place, values, keep, sums[kVecs]),
// and, to write: apply<kNontemporal>(coefficients, place, values).
//
// Sums: no float takes more than 4 addends in a row. 4 values make a chain, 4 chains a block, 4
// blocks a run, 4 runs go to double (rows); a group of 4 rows, 4 groups, 4 of those (columns).
// Their error is a quarter of a chain's length, in units of rounding: 1000 units for chains of
// 4096.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "unit.h"

namespace bnext::BNEXT_ISA_NAMESPACE {

// Bytes that stores are prefetched ahead, for lines that the core owns (-mprfchw in setup.py).
inline constexpr int64_t kStoreAheadBytes = 512;

// Where a unit lies: its first element, its row's first byte in the mask, its first bit there.
struct Place {
  int64_t element, mask_row, bit;

  Place operator+(int64_t i) const { return {element + i, mask_row, bit + i}; }
};

// A row of a channel, or a row of columns.
template <IndexMap kMap>
inline Place place(const CpuPlan& p, int64_t row, int64_t channel_or_column) {
  if constexpr (kMap == IndexMap::kRows) {
    const int64_t run = row * p.channels + channel_or_column;
    return {run * p.width, run * ((p.width + 7) / 8), 0};
  }
  return {row * p.row_stride + channel_or_column, row * ((p.row_stride + 7) / 8),
          channel_or_column};
}

// A coefficient of a channel, or of each column of a unit.
template <IndexMap kMap, class T, class A = compute_t<T>>
struct PerUnit {
  static constexpr int kCount = kMap == IndexMap::kRows ? 1 : kVecs<T>;
  Vec<A> v[kCount];

  PerUnit() = default;
  PerUnit(const void* values, int64_t bin) {
    const A* p = static_cast<const A*>(values) + bin;
    if constexpr (kMap == IndexMap::kRows)
      v[0] = Vec<A>(*p);
    else
      unrolled<kCount>([&](auto j) { v[j] = load(p + j * kLanes); });
  }
  const Vec<A>& operator[](int j) const { return v[kMap == IndexMap::kRows ? 0 : j]; }
};

// The elements of a unit that count.
struct All {};
template <class A>
inline const Vec<A>& keep(const All&, int, const Vec<A>& x) {
  return x;
}
template <class T, class A>
inline Vec<A> keep(const Mask<T, A>& mask, int j, const Vec<A>& x) {
  return select(mask.v[j], x, Vec<A>(A{0}));
}

template <int kCount, class A, int kSums>
inline void clear(Vec<A> (&sums)[kCount][kSums]) {
  unrolled<kCount * kSums>([&](auto i) { sums[i / kSums][i % kSums] = Vec<A>(A{0}); });
}

// What an infinite sum lost is NaN.
inline double finite_or_zero(double x) {
  return x - x == 0 ? x : 0;
}

// sum += x, in double. Where the values are double as well, its roundings are kept in `error`
// (Knuth's TwoSum), because a chain of any length comes here.
template <class A, class V>
inline void add_in_double(V& sum, [[maybe_unused]] V& error, const V& x) {
  if constexpr (sizeof(A) == 8) {
    const V before = sum;
    sum = before + x;
    const V added = sum - before;
    error = error + ((before - (sum - added)) + (x - added));
  } else {
    sum = sum + x;
  }
}

// From a run-time switch to an instantiation: f gets an integral constant.
template <class F>
inline void with_bool(bool value, F f) {
  if (value)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// What all bodies are made of.
template <class T, IndexMap kIndexMap, int kIn, int kOut, bool kMaskWritten = false>
struct BodyOf {
  using Element = T;
  static constexpr IndexMap kMap = kIndexMap;
  static constexpr int kInputs = kIn, kOutputs = kOut;
  static constexpr bool kWritesMask = kMaskWritten;
  static constexpr int kTogether = 1;
  static constexpr bool kInPlace = false;
  const T* in[kIn];
  T* out[std::max(kOut, 1)];
  uint8_t* mask;  // null: none

  template <int kLocality>
  void prefetch(int64_t element) const {
    for (const T* p : in) __builtin_prefetch(p + element, 0, kLocality);
  }
  void prefetch_stores(int64_t element) const {
    for (int o = 0; o < kOut; ++o)
      __builtin_prefetch(out[o] + element + kStoreAheadBytes / sizeof(T), 1, 3);
  }
};

// use(i, here, load(i, here)) of kCount units; next(i, here) moves `here` on to the one after i.
template <int kCount, class Body, class Here, class Next, class Load, class Use>
[[gnu::always_inline]] inline void for_units(const Body& body, Here here, const Next& next,
                                             const Load& load, const Use& use) {
  if constexpr (Body::kTogether > 1) {
    const Here first = here;
    decltype(load(0, here)) values[kCount];
    for (int i = 0; i < kCount; ++i) values[i] = load(i, here), next(i, here);
    body.finish(values, kCount);
    here = first;
    unrolled<kCount>([&](auto i) { use(i, here, values[i]), next(i, here); });
  } else {
    unrolled<kCount>([&](auto i) { use(i, here, load(i, here)), next(i, here); });
  }
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
