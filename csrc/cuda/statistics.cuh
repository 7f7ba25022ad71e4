// A thread's sums over its items: tiles in registers, joined in double. Floats over- or underflow
// where their squares do (1e19, 1e-19). Such a bin is summed again in double once all of it is
// there, so the rare path costs the common one no registers.
#pragma once

#include "../formulas.h"
#include "../moments.h"
#include "elements.cuh"

namespace bnext {

// Items in registers, read together so that many loads are in flight.
template <class T, int V, int kCount>
struct Tile {
  static constexpr int kItems = kCount;
  Pack<T, V> x[kItems];
  bool valid[kItems];
};

// Whether a sum of floats neither over- nor underflowed on the way.
__device__ inline bool fits_float(float sum) {
  return (sum > 1e-25f || sum < -1e-25f) && sum - sum == 0;
}
__device__ inline bool fits_float(double) {
  return true;
}

// Joins two moments; either may be empty.
__device__ inline Moments<double> join(const Moments<double>& a, const Moments<double>& b) {
  return a.count == 0 ? b : b.count == 0 ? a : combine(a, b);
}

// The sums of a thread's bins, about the mean rounded to the compute type.
template <int kBins>
struct ThreadGradSums {
  GradSums bins[kBins] = {};
  unsigned unfit = 0;  // bins with a float sum that over- or underflowed

  __device__ const GradSums& of(int bin) const { return bins[bin]; }
};

__device__ inline GradSums join(const GradSums& a, const GradSums& b) {
  return {a.dy + b.dy, a.dy_xmu + b.dy_xmu};
}

__device__ inline Moments<double> shuffled(const Moments<double>& m, int thread_bits) {
  return {shuffle_xor(m.count, thread_bits), shuffle_xor(m.mean, thread_bits),
          shuffle_xor(m.m2, thread_bits)};
}
__device__ inline GradSums shuffled(const GradSums& s, int thread_bits) {
  return {shuffle_xor(s.dy, thread_bits), shuffle_xor(s.dy_xmu, thread_bits)};
}

// The moments of a thread's bins, which have equally many values.
template <int kBins>
struct ThreadMoments {
  double count = 0;
  double mean[kBins] = {}, m2[kBins] = {};
  unsigned unfit = 0;  // bins with a float sum that over- or underflowed

  __device__ Moments<double> of(int bin) const { return {count, mean[bin], m2[bin]}; }
};

// The moments of the values that `for_each` passes to its argument, by two passes with accumulators
// of type A. The second also sums the deviations, which removes the rounding of the first's mean: a
// constant has exactly that mean and no variance. `fits`: whether A was wide enough.
template <class A, class ForEach>
__device__ inline Moments<double> two_pass(int count, const ForEach& for_each, bool& fits) {
  A sum = 0;
  for_each([&](auto x) { sum += static_cast<A>(x); });
  const A n = static_cast<A>(count), inverse_n = A(1) / n, center = sum * inverse_n;
  A deviations = 0, squares = 0;
  for_each([&](auto x) {
    const A d = static_cast<A>(x) - center;
    deviations += d;
    squares = fma(d, d, squares);
  });
  fits = fits_float(squares);
  if (!fits && squares == 0) {  // all values are equal, or an underflow
    fits = true;
    for_each([&](auto x) { fits &= static_cast<A>(x) == center; });
  }
  A error = deviations * inverse_n;
  error = fma(fma(-error, n, deviations), inverse_n, error);  // exact, if the quotient is
  return {static_cast<double>(n), static_cast<double>(center) + static_cast<double>(error),
          static_cast<double>(fma(-error * n, error, squares))};
}

// Adds a tile to the moments of a thread's bins: one bin for all elements, or one for each of V.
template <class T, int V, int kItems, int kBins>
__device__ inline void add_tile(ThreadMoments<kBins>& sums, const Tile<T, V, kItems>& tile) {
  int items = 0;
#pragma unroll
  for (int i = 0; i < tile.kItems; ++i) items += tile.valid[i];
  if (items == 0) return;
#pragma unroll
  for (int bin = 0; bin < kBins; ++bin) {
    bool fits;
    Moments<double> m = two_pass<compute_t<T>>(
        items * (V / kBins),
        [&](const auto& f) {
#pragma unroll
          for (int i = 0; i < tile.kItems; ++i)
            if (tile.valid[i]) {
#pragma unroll
              for (int v = bin; v < V; v += kBins) f(tile.x[i].get(v));
            }
        },
        fits);
    sums.unfit |= static_cast<unsigned>(!fits) << bin;
    m = join({sums.count, sums.mean[bin], sums.m2[bin]}, m);
    sums.mean[bin] = m.mean;
    sums.m2[bin] = m.m2;
  }
  sums.count += items * (V / kBins);
}

}  // namespace bnext
