// What backward kernels read: x, dy, and where the activation let it pass.
// Compiled per instruction set, as vec.h.
#pragma once

#include "../activation.h"
#include "../formulas.h"
#include "walk.h"

namespace bnext::BNEXT_ISA_NAMESPACE {

// From what a backward knows where the activation passed.
enum class Passed { kEverywhere, kInput, kMask };

// The coefficients of a forward, of which the activation needs all.
template <class T, IndexMap kMap, Passed kPassed>
struct Recomputed {
  PerUnit<kMap, T> mean, scale, shift;

  template <class Arrays>
  Recomputed(const Arrays& arrays, int64_t bin) : mean(arrays.mean, bin) {
    if constexpr (kPassed == Passed::kInput)
      scale = {arrays.scale, bin}, shift = {arrays.shift, bin};
  }
};

// Where the activation of a unit passed.
template <Passed kPassed, class T, IndexMap kMap>
inline Mask<T> where_passed(const Recomputed<T, kMap, kPassed>& k, const Unit<T>& x,
                            const uint8_t* mask, const Place& place) {
  using V = Vec<compute_t<T>>;
  if constexpr (kPassed == Passed::kMask) {
    return from_bits<T>(read_bits<T>(mask + place.mask_row, place.bit));
  } else {
    Mask<T> passed{};
    if constexpr (kPassed == Passed::kInput)
      unrolled<kVecs<T>>([&](auto j) {
        passed.v[j] = passes(apply(Affine<V>{k.mean[j], k.scale[j], k.shift[j]}, x.v[j]));
      });
    return passed;
  }
}

// dy before the activation.
template <Act kAct, class T>
inline void through_activation(const Mask<T>& passed, Unit<T>& dy) {
  if constexpr (kAct != Act::kNone)
    unrolled<kVecs<T>>([&](auto j) { dy.v[j] = activate_backward<kAct>(passed.v[j], dy.v[j]); });
}

// f(the activation, from what) of a backward.
template <class F>
inline void with_activation(Act act, const uint8_t* mask, F f) {
  using None = std::integral_constant<Act, Act::kNone>;
  using Relu = std::integral_constant<Act, Act::kRelu>;
  if (act == Act::kNone)
    f(None{}, std::integral_constant<Passed, Passed::kEverywhere>{});
  else if (mask)
    f(Relu{}, std::integral_constant<Passed, Passed::kMask>{});
  else
    f(Relu{}, std::integral_constant<Passed, Passed::kInput>{});
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
