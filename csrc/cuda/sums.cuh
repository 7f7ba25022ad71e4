// A thread's sums over its items, of two products of each value: no float takes more than four
// addends in a row (4 items, then 4 such tiles, then double), so their error does not grow with the
// number of values. Where a float was no good, because its sums cancel, over- or underflow, the
// block sums again in double (see exchange.cuh), which costs the common path no registers.
#pragma once

#include "items.cuh"

namespace bnext {

// Items in registers together, and tiles of them between two flushes to double.
inline constexpr int kTile = 4, kTilesToFlush = 4;

template <class C, int kBins>
struct Sums {
  C a[kBins] = {}, b[kBins] = {};  // of up to four tiles
  double total_a[kBins] = {}, total_b[kBins] = {};

  // Of a tile: sums of each element's place in an item, of which those of a bin join as a tree.
  template <int V>
  __device__ void add(const C (&x)[V], const C (&y)[V]) {
    if constexpr (V > kBins) {
      C half_x[V / 2], half_y[V / 2];
      const auto fold = [](C(&to)[V / 2], const C(&from)[V]) {
        const auto& [low, high] = reinterpret_cast<const C(&)[2][V / 2]>(from);
        for_each(to, [](auto p, auto q) { return bnext::add(p, q); }, low, high);
      };
      fold(half_x, x), fold(half_y, y);
      add(half_x, half_y);
    } else {
      add_to(a, x), add_to(b, y);
    }
  }
  __device__ void flush() {
#pragma unroll
    for (int v = 0; v < kBins; ++v) {
      total_a[v] += static_cast<double>(a[v]);
      total_b[v] += static_cast<double>(b[v]);
      a[v] = b[v] = 0;
    }
  }
};

// Adds an item's values x to sums a, and x y to b; the first of a tile sets them.
template <class C, int V>
__device__ inline void add_products(C (&a)[V], C (&b)[V], const C (&x)[V], const C (&y)[V],
                                    bool is_first) {
  constexpr int kStep = V % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int v = 0; v < V; v += kStep) {
    const auto x_v = lanes<kStep>(x, v), y_v = lanes<kStep>(y, v);
    set_lanes(a, v, is_first ? x_v : add(lanes<kStep>(a, v), x_v));
    set_lanes(b, v, is_first ? multiply(x_v, y_v) : multiply_add(x_v, y_v, lanes<kStep>(b, v)));
  }
}

// Calls add(k, how many) for items [first, last) that a thread has, `first` being the first of a
// tile, or of what no tile holds. kOnce: there is one `add`, for a number that is not known.
template <bool kOnce, class Items, class Sums, class Add>
__device__ inline void sum_items(const Items& items, int first, int last, Sums& sums,
                                 const Add& add) {
  if (!items.owns()) return;
  if constexpr (kOnce) {
    const int mine = items.valid(last - 1) ? last : last - 1;
#pragma unroll 1
    for (int k = first; k < mine;) {
      const int end = k + kTile * kTilesToFlush < mine ? k + kTile * kTilesToFlush : mine;
#pragma unroll 1
      for (; k < end; k += kTile) add(k, end - k < kTile ? end - k : kTile);
      sums.flush();
    }
    return;
  }
  const int full = last < items.full() ? last : items.full(), tiles = full - full % kTile;
  int k = first;
#pragma unroll 1
  while (k < tiles) {
    const int end = k + kTile * kTilesToFlush < tiles ? k + kTile * kTilesToFlush : tiles;
#pragma unroll 1
    for (; k < end; k += kTile) add(k, Count<kTile>{});
    sums.flush();
  }
#pragma unroll 1
  for (; k < last; ++k) {
    if (items.valid(k)) add(k, Count<1>{});
  }
  sums.flush();
}

// The same sums in double: get(k, v, a, b) adds those of element v of item k.
template <int V, class Items, class Sums, class Get>
__device__ inline void sum_again(const Items& items, Sums& sums, const Get& get) {
  sums = {};
  const int elements = static_cast<int>(opaque(V));  // or ptxas unrolls the loop all the same
#pragma unroll 1
  for (int v = 0; v < elements; ++v) {
    double a = 0, b = 0;
#pragma unroll 1
    for (int k = 0; k < items.total(); ++k)
      if (items.valid(k)) get(k, v, a, b);
#pragma unroll
    for (int bin = 0; bin < Items::kBins; ++bin)
      if (Items::kBins == 1 || v == bin) sums.total_a[bin] += a, sums.total_b[bin] += b;
  }
}

}  // namespace bnext
