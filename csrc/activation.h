// What follows the normalisation: y = act(z). Written once, for device scalars and for whatever
// vectors the host has: those bring operator<=, operator! and keep() of their own.
#pragma once

#include "problem.h"

namespace bnext {

// Whether z passes the activation; NaN does, as in torch.
template <class T>
BNEXT_HD inline auto passes(const T& z) {
  return !(z <= T(0));
}

template <class T>
BNEXT_HD inline T keep(bool passed, T z) {
  return passed ? z : T(0);
}

// act(z), and dy times act'(z), by whether z passed.
template <Act kAct, class Passed, class T>
BNEXT_HD inline T activate(const Passed& passed, const T& z) {
  static_assert(kAct == Act::kRelu);
  return keep(passed, z);
}
template <Act kAct, class Passed, class T>
BNEXT_HD inline T activate_backward(const Passed& passed, const T& dy) {
  static_assert(kAct == Act::kRelu);
  return keep(passed, dy);
}

}  // namespace bnext
