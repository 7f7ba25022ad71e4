// exp, expm1, sigmoid, tanh and erf of Vec: floats by polynomials, within 2 ulp of the exact value
// everywhere (subnormal results too), doubles by the library. NaN gives NaN. Generic code says
// `using std::exp;` and calls exp(x), for vectors and scalars alike.
//
// Coefficients are minimax (Remez exchange, 50 digits), rounded to float from the lowest power
// upwards, the others fitted anew each time. The error given is of the polynomial alone.
#pragma once

#include <cmath>

#include "vec.h"

namespace bnext::BNEXT_ISA_NAMESPACE {

// Floats of one register, as numbers and as bits.
using Floats = Vec<float>::native;
typedef uint32_t Bits __attribute__((vector_size(sizeof(Floats))));

inline Floats broadcast(float x) {
  return x - Floats{};
}

// By Horner's rule, from the highest power's coefficient down.
template <class... C>
inline Floats polynomial(const Floats& x, float highest, C... others) {
  Floats r = broadcast(highest);
  ((r = fma_native(r, x, broadcast(others))), ...);
  return r;
}

// x where it is NaN. Written out because gcc 12 compares and blends.
inline Floats at_most(float bound, const Floats& x) {
#if defined(__AVX512F__)
  return _mm512_min_ps(broadcast(bound), x);
#elif defined(__AVX2__)
  return _mm256_min_ps(broadcast(bound), x);
#elif defined(__SSE__)
  return _mm_min_ps(broadcast(bound), x);
#else
  return broadcast(bound) < x ? broadcast(bound) : x;
#endif
}
inline Floats at_least(float bound, const Floats& x) {
#if defined(__AVX512F__)
  return _mm512_max_ps(broadcast(bound), x);
#elif defined(__AVX2__)
  return _mm256_max_ps(broadcast(bound), x);
#elif defined(__SSE__)
  return _mm_max_ps(broadcast(bound), x);
#else
  return broadcast(bound) > x ? broadcast(bound) : x;
#endif
}

inline Floats magnitude(const Floats& x) {
  return (Floats)((Bits)x & 0x7fffffff);
}
inline Floats with_sign_of(const Floats& x, const Floats& magnitude) {
  return (Floats)((Bits)magnitude | ((Bits)x & 0x80000000));
}

// 2^(n - 127) for 0 < n < 255 in the low 9 bits; those above are shifted out.
inline Floats power_of_two(const Bits& n) {
  return (Floats)(n << 23);
}

// Near kRound the floats are the integers: adding it rounds, and the low bits are the integer.
inline constexpr float kRound = 0x1.8p23f;
inline constexpr float kLog2E = 0x1.715476p+0f;

// x - n ln 2. The first part of ln 2 has 15 bits, so that its product with n is exact.
inline Floats minus_ln2(const Floats& x, const Floats& n) {
  return fma_native(n, broadcast(-0x1.7f7d1cp-20f), fma_native(n, broadcast(-0x1.62e4p-1f), x));
}

// exp(x) = 2^n (1 + e); `biased` has n + bias in its low bits.
struct Exponential {
  Bits biased;
  Floats e;
};
inline Exponential exponential(const Floats& x, int bias) {
  const float round = kRound + static_cast<float>(bias);
  const Floats rounded = fma_native(x, broadcast(kLog2E), broadcast(round));
  const Floats r = minus_ln2(x, rounded - round);
  // (exp(r) - 1 - r) / r^2, degree 4: |r| <= ln(2) / 2, error 3.2e-9 of exp(r).
  const Floats q =
      polynomial(r, 1.3838839e-3f, 8.369192e-3f, 4.1668102e-2f, 1.6666517e-1f, 4.9999994e-1f);
  return {(Bits)rounded, fma_native(r * r, q, r)};
}

// Two factors, because n runs from -150 to 128; only the second rounds a subnormal result.
inline Floats exp_native(const Floats& x) {
  const auto [n, e] = exponential(at_least(-104, at_most(89, x)), 2 * 127);
  const Floats s = power_of_two(n >> 1);
  return fma_native(s, e, s) * power_of_two(n - (n >> 1));
}

// Twice (2^(n-1) e + 2^(n-1) - 1/2), which does not overflow before the result. It is -1 at -18.
inline Floats expm1_native(const Floats& x) {
  const auto [n, e] = exponential(at_least(-18, at_most(89, x)), 127 - 1);
  const Floats s = power_of_two(n);
  return with_sign_of(x, fma_native(s, e, s - 0.5f) * 2.0f);  // -0 has become +0
}

// 1 / (1 + exp(-x)), both parts times 2^-24, so that exp(104) is finite. It is 1 at 70.
inline Floats sigmoid_native(const Floats& x) {
  const auto [n, e] = exponential(-at_least(-104, at_most(70, x)), 127 - 24);
  const Floats s = power_of_two(n);
  return 0x1p-24f / (fma_native(s, e, broadcast(0x1p-24f)) + s);
}

// |x| = n ln 2 + y. With t = tanh(y) and v = 2 / 4^n the addition formula is
//   tanh |x| = ((2 + v) t + 2 - v) / ((2 - v) t + 2 + v)
// which is t for n = 0. For other n it is accurate only from 1/2 on: hence n = 0 up to 0.556. The
// denominator is the numerator and v (2 - 2 t), so that they share an error.
inline Floats tanh_native(const Floats& x) {
  constexpr float kBiased = kRound + 64;
  const Floats size = at_most(10, magnitude(x));
  // 64 - n in its low bits.
  const Floats rounded = fma_native(size - 0.21f, broadcast(-kLog2E), broadcast(kBiased));
  const Floats y = minus_ln2(size, kBiased - rounded);
  const Floats v = (Floats)((Bits)rounded << 24);
  // (tanh(y) - y) / y^3, degree 3 in y^2: |y| <= 0.5575, error 4.2e-8 of tanh(y).
  const Floats y2 = y * y;
  const Floats q = polynomial(y2, 1.6313778e-2f, -5.2607805e-2f, 1.3319746e-1f, -3.3332905e-1f);
  const Floats t = fma_native(y * y2, q, y);
  const Floats numerator = fma_native(t, 2.0f + v, 2.0f - v);
  const Floats rest = fma_native(t, broadcast(-2), broadcast(2));
  return with_sign_of(x, numerator / fma_native(v, rest, numerator));
}

// Up to 1.16 an odd polynomial; above it 1 - erfc(x), erfc(x)^(1/8) being nearly a polynomial.
inline Floats erf_native(const Floats& x) {
  const Floats size = at_most(4, magnitude(x));
  // erf(x) / x - 1, degree 6 in x^2: |x| <= 1.16, error 9.8e-9 of erf(x).
  const Floats p = polynomial(size * size, 6.8229325e-5f, -7.6795e-4f, 5.1488043e-3f,
                              -2.6832363e-2f, 1.1283078e-1f, -3.7612587e-1f, 1.2837917e-1f);
  // erfc(x)^(1/8), degree 6: 1.16 <= x <= 3.95, error 5.2e-9 in erf(x).
  Floats q = polynomial(size, 1.6562753e-4f, -2.6413903e-3f, 1.3687701e-2f, -1.3140093e-2f,
                        -5.916753e-2f, -1.4657195e-1f, 1.0012485f);
  q *= q;
  q *= q;
  q *= q;
  return with_sign_of(x, size < 1.16f ? fma_native(size, p, size) : 1.0f - q);
}

template <class T>
inline T sigmoid(T x)
  requires std::is_floating_point_v<T>
{
  const T e = std::exp(-std::fabs(x));
  return (x < 0 ? e : 1) / (1 + e);
}

using std::erf, std::exp, std::expm1, std::tanh;

#define BNEXT_VEC_FUNCTION(name)                                                 \
  inline Vec<float> name(const Vec<float>& x) {                                  \
    Vec<float> r;                                                                \
    for (int i = 0; i < Vec<float>::kCount; ++i) r.v[i] = name##_native(x.v[i]); \
    return r;                                                                    \
  }                                                                              \
  inline Vec<double> name(const Vec<double>& x) {                                \
    double lanes[kLanes];                                                        \
    std::memcpy(lanes, &x, sizeof lanes);                                        \
    for (double& lane : lanes) lane = name(lane);                                \
    Vec<double> r;                                                               \
    std::memcpy(&r, lanes, sizeof lanes);                                        \
    return r;                                                                    \
  }
BNEXT_VEC_FUNCTION(exp)
BNEXT_VEC_FUNCTION(expm1)
BNEXT_VEC_FUNCTION(sigmoid)
BNEXT_VEC_FUNCTION(tanh)
BNEXT_VEC_FUNCTION(erf)
#undef BNEXT_VEC_FUNCTION

}  // namespace bnext::BNEXT_ISA_NAMESPACE
