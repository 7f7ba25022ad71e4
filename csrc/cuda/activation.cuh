// The activations of ../activation.h for the elements of an item: their kind is the same for all
// threads, and asked once for an item.
#pragma once

#include <cmath>

#include "../activation.h"
#include "elements.cuh"

namespace bnext {

// For which activations a kernel has hot loops of their own: by kAlone for none and for ReLU, by
// kMasks also where a mask is written or read. All others share one.
template <class T, int V, IndexMap kMap>
struct Loops {
  static constexpr bool kMasks = sizeof(T) * V == 16;
  static constexpr bool kAlone =
      kMasks || (sizeof(T) * V == 8 && V > 1 && kMap == IndexMap::kRows);  // 14x14 in 16 bits
};

// What activation.h computes with. kQuick: 16-bit results need no more than the quick exp.
template <class C, bool kQuick>
struct Real {
  C value;

  template <class N>
  __device__ explicit Real(N number) : value(static_cast<C>(number)) {}

  __device__ friend Real operator+(Real a, Real b) { return Real(a.value + b.value); }
  __device__ friend Real operator-(Real a, Real b) { return Real(a.value - b.value); }
  __device__ friend Real operator*(Real a, Real b) { return Real(a.value * b.value); }
  __device__ friend Real fma(Real a, Real b, Real c) {
    return Real(std::fma(a.value, b.value, c.value));
  }
  __device__ friend bool operator<(Real a, Real b) { return a.value < b.value; }
  __device__ friend bool operator<=(Real a, Real b) { return a.value <= b.value; }
  __device__ friend Real exp(Real z) {
    if constexpr (kQuick) return Real(quick_exp(z.value));
    return Real(std::exp(z.value));
  }
  __device__ friend Real sigmoid(Real z) {
    if constexpr (kQuick) return Real(quick_reciprocal(1 + quick_exp(-z.value)));
    return Real(1 / (1 + std::exp(-z.value)));
  }
  __device__ friend Real expm1(Real z) { return Real(std::expm1(z.value)); }
  __device__ friend Real tanh(Real z) { return Real(std::tanh(z.value)); }
  __device__ friend Real erf(Real z) { return Real(std::erf(z.value)); }
};

// `benchmarks sass` counts whole loops, so it has one of the activations compiled alone, with no
// residual, mask or residual's gradient beside it.
#ifdef BNEXT_ONLY_ACT
__device__ constexpr Act compiled(Act) {
  return Act::BNEXT_ONLY_ACT;
}
template <class Beside>
__device__ constexpr Beside* compiled(Beside*) {
  return nullptr;
}
#else
template <class Value>
__device__ constexpr Value compiled(Value value) {
  return value;
}
#endif

// f(z) of each of an item's elements.
template <bool kQuick, class C, int V>
__device__ inline void activate(Act act, C param, C (&z)[V]) {
  using R = Real<C, kQuick>;
  if (compiled(act) == Act::kNone) return;
  visit_act(compiled(act), [&](auto a) {
#pragma unroll
    for (int v = 0; v < V; ++v) z[v] = a.f(R(z[v]), R(param)).value;
  });
}

// dy f'(z) of each.
template <bool kQuick, class C, int V>
__device__ inline void activate_backward(Act act, C param, const C (&z)[V], C (&dy)[V]) {
  using R = Real<C, kQuick>;
  if (compiled(act) == Act::kNone) return;
  visit_act(compiled(act), [&](auto a) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if constexpr (a.needs == Needs::kSign)
        dy[v] = a.gradient(a.passes(z[v]), dy[v], param);
      else
        dy[v] *= a.df(R(z[v]), R(param)).value;
    }
  });
}

// Where that is enough: which elements pass, as bits, and dy f'(z) by them.
template <class C, int V>
__device__ inline unsigned passing_bits(Act act, const C (&z)[V]) {
  unsigned bits = 0;
  visit_sign(act, [&](auto a) {
#pragma unroll
    for (int v = 0; v < V; ++v) bits |= static_cast<unsigned>(a.passes(z[v])) << v;
  });
  return bits;
}
template <class C, int V>
__device__ inline void activate_backward(Act act, C param, unsigned bits, C (&dy)[V]) {
  visit_sign(act, [&](auto a) {
#pragma unroll
    for (int v = 0; v < V; ++v) dy[v] = a.gradient(bits >> v & 1, dy[v], param);
  });
}

}  // namespace bnext
