// The activations in a kernel. Compiled per instruction set, as vec.h.
#pragma once

#include "vec_math.h"
#include "../activation.h"
#include "walk.h"

namespace bnext::BNEXT_ISA_NAMESPACE {

// Which of them a kernel is compiled for. kAny calls out of its loop for each unit, which next to an
// exponential costs little: all kernels inlined for each activation would take nine times as long
// to compile.
enum class Kind { kNone, kRelu, kAny };

struct ActOf {
  Act kind;
  double param;
};

// f(the kind that it is compiled for).
template <class F>
inline void with_compiled(Act kind, F f) {
  if (kind == Act::kNone)
    f(std::integral_constant<Kind, Kind::kNone>{});
  else if (kind == Act::kRelu)
    f(std::integral_constant<Kind, Kind::kRelu>{});
  else
    f(std::integral_constant<Kind, Kind::kAny>{});
}

// f(Activation<kind>), inlined, of those that need a sign.
template <Kind kKind, class F>
[[gnu::always_inline]] inline void with_sign(Act kind, const F& f) {
  if constexpr (kKind == Kind::kRelu)
    f(Activation<Act::kRelu>{});
  else
    visit_sign(kind, f);
}

// z = f(z).
template <class T>
[[gnu::noinline]] void activate_any(const ActOf& act, Unit<T>& z) {
  visit_act(act.kind, [&](auto a) {
    const Vec<compute_t<T>> param(static_cast<compute_t<T>>(act.param));
    for (auto& v : z.v) v = a.f(v, param);
  });
}

// dy = dy f'(z).
template <class T>
[[gnu::noinline]] void through_any(const ActOf& act, const Unit<T>& z, Unit<T>& dy) {
  visit_act(act.kind, [&](auto a) {
    const Vec<compute_t<T>> param(static_cast<compute_t<T>>(act.param));
    for (int j = 0; j < kVecs<T>; ++j) {
      if constexpr (decltype(a)::needs == Needs::kSign)
        dy.v[j] = a.gradient(a.passes(z.v[j]), dy.v[j], param);
      else
        dy.v[j] = dy.v[j] * a.df(z.v[j], param);
    }
  });
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
