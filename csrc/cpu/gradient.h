// What backward kernels read: x, dy, and what the activation's gradient needs.
// Compiled per instruction set, as vec.h.
#pragma once

#include "../formulas.h"
#include "act.h"

namespace bnext::BNEXT_ISA_NAMESPACE {

// From what a backward knows z = bn(x) + residual, or where the activation passed it.
enum class Source { kNothing, kMask, kInput, kSum };

// The coefficients of a forward, of which a z made from x needs all.
template <class T, IndexMap kMap, Source kSource>
struct Recomputed {
  static constexpr bool kWhole = kSource == Source::kInput || kSource == Source::kSum;
  PerUnit<kMap, T> mean, scale, shift;

  template <class Arrays>
  Recomputed(const Arrays& arrays, int64_t bin) : mean(arrays.mean, bin) {
    if constexpr (kWhole) scale = {arrays.scale, bin}, shift = {arrays.shift, bin};
  }
  // The forward's z, bit for bit.
  Vec<compute_t<T>> z(int j, const Unit<T>& x, const Unit<T>& residual) const {
    using V = Vec<compute_t<T>>;
    V z = apply(Affine<V>{mean[j], scale[j], shift[j]}, x.v[j]);
    if constexpr (kSource == Source::kSum) z = z + residual.v[j];
    return z;
  }
};

// The gradient of an activation.
template <class T, Kind kKind, Source kSource>
struct ActGradient {
  using V = Vec<compute_t<T>>;
  ActOf act;

  // Where a unit passed, of those that need no more.
  template <class Forward>
  Mask<T> passed(const Forward& k, const Unit<T>& x, const uint8_t* mask,
                 const Place& place) const {
    if constexpr (kSource == Source::kMask)
      return from_bits<T>(read_bits<T>(mask + place.mask_row, place.bit));
    Mask<T> passed{};
    if constexpr (kSource == Source::kInput)
      with_sign<kKind>(act.kind, [&](auto a) {
        unrolled<kVecs<T>>([&](auto j) { passed.v[j] = a.passes(k.z(j, x, x)); });
      });
    return passed;
  }
  void through(const Mask<T>& passed, Unit<T>& dy) const {
    if constexpr (kKind != Kind::kNone)
      with_sign<kKind>(act.kind, [&](auto a) {
        const V param(static_cast<compute_t<T>>(act.param));
        unrolled<kVecs<T>>([&](auto j) { dy.v[j] = a.gradient(passed.v[j], dy.v[j], param); });
      });
  }

  // dy before any activation.
  template <class Forward>
  void through(const Forward& k, const Unit<T>& x, const Unit<T>& residual, const uint8_t* mask,
               const Place& place, Unit<T>& dy) const {
    if constexpr (kSource == Source::kMask) {
      through(passed(k, x, mask, place), dy);
    } else if constexpr (kKind != Kind::kNone) {
      Unit<T> z;
      unrolled<kVecs<T>>([&](auto j) { z.v[j] = k.z(j, x, residual); });
      if constexpr (kKind == Kind::kAny)
        through_any(act, z, dy);
      else
        unrolled<kVecs<T>>([&](auto j) {
          using Relu = Activation<Act::kRelu>;
          dy.v[j] = Relu::gradient(Relu::passes(z.v[j]), dy.v[j], dy.v[j]);
        });
    }
  }
};

// f(kind, source) of a backward; kMost: the most that its kernels can need.
template <Source kMost, class Args, class F>
inline void with_activation(Act act, const Args& args, F f) {
  const auto from = [&]<Source kSource>(std::integral_constant<Source, kSource> source) {
    if (act != Act::kRelu)
      f(std::integral_constant<Kind, Kind::kAny>{}, source);
    else if constexpr (kSource != Source::kSum)  // with a residual it has a mask
      f(std::integral_constant<Kind, Kind::kRelu>{}, source);
  };
  if (act == Act::kNone)
    f(std::integral_constant<Kind, Kind::kNone>{},
      std::integral_constant<Source, Source::kNothing>{});
  else if (args.mask)
    from(std::integral_constant<Source, Source::kMask>{});
  else if (kMost == Source::kInput || !args.residual)
    from(std::integral_constant<Source, Source::kInput>{});
  else if constexpr (kMost == Source::kSum)
    from(std::integral_constant<Source, Source::kSum>{});
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
