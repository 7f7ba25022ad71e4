// The per-element arithmetic of batch norm, for host scalars, host vectors and device scalars. All
// kernels use these functions, so the sign that backward recomputes for a ReLU is bit-identical.
#pragma once

#include <cmath>

#include "problem.h"

namespace bnext {

BNEXT_HD inline double inverse_std(double variance, double eps) {
  return 1 / sqrt(variance + eps);
}

// z = (x - mean) * scale + shift. T is the compute type (float, double or a vector of them).
// The mean is split: `mean` is rounded to T, so x - mean is exact near the mean, and its rounding
// error is folded into shift, with what a double cannot hold of it, `low`. A large mean costs no
// accuracy and a constant channel gives exactly the bias.
template <class T>
struct Affine {
  T mean, scale, shift;
};

template <class T>
BNEXT_HD inline Affine<T> make_affine(double mean, double invstd, double weight, double bias,
                                      double low = 0) {
  const T mean_rounded = static_cast<T>(mean);
  const double scale = weight * invstd;
  return {mean_rounded, static_cast<T>(scale),
          static_cast<T>(bias - (mean - static_cast<double>(mean_rounded) + low) * scale)};
}

template <class T>
BNEXT_HD inline T apply(const Affine<T>& a, const T& x) {
  return fma(x - a.mean, a.scale, a.shift);
}

// sum(dy) and sum(dy * (x - mean)) of a channel.
struct GradSums {
  double dy, dy_xmu;
};

// dx = a * dy + b * h + c with h = (x - mean) * invstd, the gradient of Ioffe & Szegedy (2015),
// section 3: the means of dy and dy h are gathered into b and c. With frozen statistics b = c = 0.
template <class T>
struct InputGrad {
  T mean, invstd, a, b, c;
};

template <class T>
BNEXT_HD inline InputGrad<T> make_input_grad(double mean, double invstd, double weight,
                                             double mean_dy, double mean_dy_h, double low = 0) {
  const T mean_rounded = static_cast<T>(mean);
  const double a = weight * invstd;
  const double b = -a * mean_dy_h;
  const double mean_error = (mean - static_cast<double>(mean_rounded) + low) * invstd;
  return {mean_rounded, static_cast<T>(invstd), static_cast<T>(a), static_cast<T>(b),
          static_cast<T>(-a * mean_dy - b * mean_error)};
}

template <class T>
BNEXT_HD inline T apply(const InputGrad<T>& g, const T& dy, const T& x) {
  return fma((x - g.mean) * g.invstd, g.b, fma(dy, g.a, g.c));
}

// The second derivatives. With h = (x - mean) / std, u = grad_grad_input, g = grad_out (where the
// ReLU passed) and P z = z - mean(z) - h mean(z h), the first backward is
//   dx = weight / std P g,   dweight = sum g h,   dbias = sum g,   dresidual = g
// and these differentiate L = <u, dx> + <ggw, dweight> + <ggb, dbias> + <v, dresidual>:
//   dL/dg      = weight / std P u + ggw h + ggb + v
//   dL/dweight = q / std,   q = <u, P g> = sum u g - sum u mean g - sum u h mean g h
//   dL/dx      = (P z - weight / std q / M h) / std,
//                z = (ggw - weight / std mean(u h)) g - weight / std mean(g h) u
// where q / M h / std comes from 1 / std, and P from h's own mean and 1 / std. With frozen
// statistics P is the identity in dx, and dL/dx = ggw g / std.
struct DoubleBackwardSums {
  double u, g, u_xmu, g_xmu, u_g;  // xmu: x - mean rounded to the compute type
};

//   dL/dg = a_u u + a_h h + a_1 + v,   dL/dx = b_g g + b_u u + b_h h + b_1
struct DoubleBackwardCoefficients {
  double a_u, a_h, a_1, b_g, b_u, b_h, b_1, grad_weight;
};

// `rounding` is the mean minus the rounded mean.
BNEXT_HD inline DoubleBackwardCoefficients make_double_backward(const DoubleBackwardSums& s,
                                                                double count, bool frozen,
                                                                double rounding, double invstd,
                                                                double weight, double ggw,
                                                                double ggb) {
  const double a = weight * invstd;
  DoubleBackwardCoefficients k{a, ggw, ggb, ggw * invstd, 0, 0, 0, 0};
  double q = s.u_g;
  if (!frozen) {
    const double mean_u = s.u / count, mean_g = s.g / count;
    const double mean_uh = (s.u_xmu - rounding * s.u) / count * invstd;
    const double mean_gh = (s.g_xmu - rounding * s.g) / count * invstd;
    q -= count * (mean_u * mean_g + mean_uh * mean_gh);
    k.a_h -= a * mean_uh;
    k.a_1 -= a * mean_u;
    const double z_g = ggw - a * mean_uh, z_u = -a * mean_gh;
    k.b_g = invstd * z_g;
    k.b_u = invstd * z_u;
    k.b_h = -invstd * (z_g * mean_gh + z_u * mean_uh + a * q / count);
    k.b_1 = -invstd * (z_g * mean_g + z_u * mean_u);
  }
  k.a_1 -= k.a_h * rounding * invstd;
  k.b_1 -= k.b_h * rounding * invstd;
  k.grad_weight = q * invstd;
  return k;
}

}  // namespace bnext
