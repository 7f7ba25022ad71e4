// The moments of a set of values, and how two sets join (Chan, Golub & LeVeque 1979).
#pragma once

#include "problem.h"

namespace bnext {

// mean and m2 = sum((x - mean)^2) of `count` values; T may be a vector of channels.
template <class T>
struct Moments {
  double count;
  T mean, m2;
};

// The joint moments of two disjoint sets, neither empty. Exact where the means are equal.
template <class T>
BNEXT_HD inline Moments<T> combine(const Moments<T>& a, const Moments<T>& b) {
  const double count = a.count + b.count;
  const double share = b.count / count;
  const T delta = b.mean - a.mean;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * (a.count * share)};
}

}  // namespace bnext
