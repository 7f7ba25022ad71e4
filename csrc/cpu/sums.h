// How kernels sum a tile: in accumulators of the compute type, because the float sums of a tile are
// short enough to lose a few units in the last place, and half as costly as double ones. Tiles join
// in double. Where a result shows that floats over- or underflowed (as squares of 1e19 and 1e-19
// do), the tile is summed again in double. Compiled per instruction set, as vec.h.
#pragma once

#include "tiles.h"

namespace bnext::BNEXT_ISA_NAMESPACE {

// Sums in accumulators of A: of one bin over a row's vectors, or of columns.
template <IndexMap kMap, class A>
struct Sum {
  static constexpr int kCount = kMap == IndexMap::kRows ? kAccumulators : 1;
  Vec<A> v[kCount];

  Sum() {
    for (auto& s : v) s = Vec<A>(A{0});
  }
  double total() const
    requires(kMap == IndexMap::kRows)
  {
    return sum_lanes((to_double(v[0]) + to_double(v[1])) + (to_double(v[2]) + to_double(v[3])));
  }
};

// Whether a sum of floats neither over- nor underflowed on the way.
template <class A>
inline bool fits_float(A value) {
  return (value > A(1e-25) || value < A(-1e-25)) && value - value == 0;
}

// Whether sums that were shifted by a value `distance` from their mean kept their digits: not where
// the shift was an outlier, many standard deviations away.
template <class A>
inline bool fits_shift(A distance, A m2, A count) {
  return distance * distance * count <= A(64) * m2;
}

// Per-bin results of a tile, and whether the accumulators were wide enough for them.
struct Results {
  alignas(64) double first[kTileColumns], second[kTileColumns];
  bool fits[kTileColumns];
};

// Replaces the results that do not fit by those of again(results), a sum in double; bin by bin,
// so that no bin depends on its neighbours.
template <class Again>
inline void settle(Results& r, int64_t bins, Again again) {
  bool all = true;
  for (int64_t i = 0; i < bins; ++i) all &= r.fits[i];
  if (all) return;
  Results exact;
  again(exact);
  for (int64_t i = 0; i < bins; ++i)
    if (!r.fits[i]) r.first[i] = exact.first[i], r.second[i] = exact.second[i];
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
