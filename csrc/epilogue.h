// The per-element arithmetic of batch norm, for host scalars, host vectors and device scalars:
// every kernel, forward or backward, goes through these, so that a recomputed ReLU sign is
// bit-identical. Includes welford.h for BNEXT_HD, and cmath.
#pragma once

#include <cmath>

#include "welford.h"

namespace bnext {

BNEXT_HD inline double inverse_std(double variance, double eps) {
  return 1 / sqrt(variance + eps);
}

// z = (x - mean) * scale + shift. T is the compute type (float, double or a vector of them).
// The mean is split: `mean` is rounded to T, so x - mean is exact near the mean, and its rounding
// error is folded into shift. A large mean costs no accuracy and a constant channel gives exactly
// the bias.
template <class T>
struct Affine {
  T mean, scale, shift;
};

template <class T>
BNEXT_HD inline Affine<T> make_affine(double mean, double invstd, double weight, double bias) {
  const T mean_rounded = static_cast<T>(mean);
  const double scale = weight * invstd;
  return {mean_rounded, static_cast<T>(scale),
          static_cast<T>(bias - (mean - static_cast<double>(mean_rounded)) * scale)};
}

template <class T>
BNEXT_HD inline T apply(const Affine<T>& a, const T& x) {
  return fma(x - a.mean, a.scale, a.shift);
}

// dx = a * dy + b * ((x - mean) * invstd) + c, the gradient of Ioffe & Szegedy (2015), section 3,
// with the two means gathered into b and c. Frozen statistics: b = c = 0.
template <class T>
struct InputGrad {
  T mean, invstd, a, b, c;
};

template <class T>
BNEXT_HD inline InputGrad<T> make_input_grad(double mean, double invstd, double weight,
                                             double mean_dy, double mean_dy_xmu) {
  const T mean_rounded = static_cast<T>(mean);
  const double a = weight * invstd;
  const double b = -a * invstd * mean_dy_xmu;
  const double mean_error = (mean - static_cast<double>(mean_rounded)) * invstd;
  return {mean_rounded, static_cast<T>(invstd), static_cast<T>(a), static_cast<T>(b),
          static_cast<T>(-a * mean_dy - b * mean_error)};
}

template <class T>
BNEXT_HD inline T apply(const InputGrad<T>& g, const T& dy, const T& x) {
  return fma((x - g.mean) * g.invstd, g.b, fma(dy, g.a, g.c));
}

}  // namespace bnext
