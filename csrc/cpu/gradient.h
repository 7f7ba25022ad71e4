// What both derivatives' kernels make again of the forward. Compiled per instruction set, as vec.h.
#pragma once

#include "../formulas.h"
#include "act.h"

namespace bnext::BNEXT_ISA_NAMESPACE {

// The coefficients of a forward; of those that z is not made of again (kWhole), the mean alone.
template <class T, IndexMap kMap, bool kWhole>
struct Recomputed {
  PerUnit<kMap, T> mean, scale, shift;

  Recomputed() = default;
  template <class Arrays>
  Recomputed(const Arrays& arrays, int64_t bin) : mean(arrays.mean, bin) {
    if constexpr (kWhole) scale = {arrays.scale, bin}, shift = {arrays.shift, bin};
  }
  // bn(x), bit for bit as in the forward.
  Unit<T> z(const Unit<T>& x) const {
    using V = Vec<compute_t<T>>;
    Unit<T> z;
    unrolled<kVecs<T>>(
        [&](auto j) { z.v[j] = apply(Affine<V>{mean[j], scale[j], shift[j]}, x.v[j]); });
    return z;
  }
};

// Where the forward passed, from its mask.
template <class T>
inline Mask<T> read_mask(const uint8_t* mask, const Place& place) {
  return from_bits<T>(read_bits<T>(mask + place.mask_row, place.bit));
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
