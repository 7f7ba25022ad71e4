// An activation in a kernel. Compiled per instruction set, as vec.h.
#pragma once

#include "../activation.h"
#include "plan.h"
#include "vec_math.h"
#include "walk.h"

namespace bnext::BNEXT_ISA_NAMESPACE {

// What kernels are compiled for: no activation, ReLU, and any. One for each activation would take
// three times as long to compile.
enum class Kind { kNone, kRelu, kAny };

// f(the kind).
template <class F>
inline void with_kind(Act act, F f) {
  if (is_any(act))
    f(std::integral_constant<Kind, Kind::kAny>{});
  else if (act == Act::kRelu)
    f(std::integral_constant<Kind, Kind::kRelu>{});
  else
    f(std::integral_constant<Kind, Kind::kNone>{});
}

// Any activation, known at run time. What it calls takes four vectors at once, which hides its
// latency.
template <class T>
class AnyAct {
  using V = Vec<compute_t<T>>;

 public:
  static constexpr int kUnits = 4 / kVecs<T>;

  // z, and dy on its way to dy f'(z).
  struct Operands {
    V z, dy;
  };

  AnyAct() = default;
  AnyAct(Act kind, double param) : kind_(kind), param_(static_cast<compute_t<T>>(param)) {
    if (kind != Act::kNone)
      visit_act(kind, [&](auto a) { f_ = f<decltype(a)>, gradient_ = gradient<decltype(a)>; });
  }

  // From z to f(z).
  void activate(V* z, int count) const { f_(z, count, param_); }
  void through(Operands* operands, int count) const {
    if (gradient_) gradient_(operands, count, param_);
  }

  // Of those that need no more than where they passed.
  template <Kind kKind>
  Mask<T> passes(const Unit<T>& z) const {
    Mask<T> passed;
    visit_sign(kKind == Kind::kRelu ? Act::kRelu : kind_, [&](auto a) {
      unrolled<kVecs<T>>([&](auto j) { passed.v[j] = a.passes(z.v[j]); });
    });
    return passed;
  }
  template <Kind kKind>
  void through(const Mask<T>& passed, Unit<T>& dy) const {
    visit_sign(kKind == Kind::kRelu ? Act::kRelu : kind_, [&](auto a) {
      unrolled<kVecs<T>>([&](auto j) { dy.v[j] = a.gradient(passed.v[j], dy.v[j], V(param_)); });
    });
  }

 private:
  template <class A>
  static void f(V* z, int count, compute_t<T> param) {
    for (int i = 0; i < count; ++i) z[i] = A::f(z[i], V(param));
  }
  template <class A>
  static void gradient(Operands* operands, int count, compute_t<T> param) {
    for (int i = 0; i < count; ++i) {
      auto& [z, dy] = operands[i];
      if constexpr (A::needs == Needs::kSign)
        dy = A::gradient(A::passes(z), dy, V(param));
      else
        dy = dy * A::df(z, V(param));
    }
  }

  Act kind_;
  compute_t<T> param_;
  void (*f_)(V*, int, compute_t<T>) = nullptr;
  void (*gradient_)(Operands*, int, compute_t<T>) = nullptr;
};

}  // namespace bnext::BNEXT_ISA_NAMESPACE
