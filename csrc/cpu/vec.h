// kLanes lanes of float or double on whatever vectors the instruction set has: their arithmetic.
// Compiled once per instruction set; everything lives in that set's namespace, because a shared
// inline function might be taken from the object file that needs the newest CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace bnext::BNEXT_ISA_NAMESPACE {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kLanes = 8;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kLanes = 8;
#endif

// Storage of the 16-bit dtypes; arithmetic is in float.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
struct Vec {
  static constexpr int kBytes =
      kLanes * sizeof(T) < kVectorBytes ? kLanes * sizeof(T) : kVectorBytes;
  static constexpr int kCount = kLanes * sizeof(T) / kBytes;
  typedef T native __attribute__((vector_size(kBytes)));
  native v[kCount];

  Vec() = default;
  Vec(T scalar) {
    for (auto& part : v) part = scalar - native{};
  }
};

#define BNEXT_VEC_OPERATOR(op)                                          \
  template <class T>                                                    \
  inline Vec<T> operator op(const Vec<T>& a, const Vec<T>& b) {         \
    Vec<T> r;                                                           \
    for (int i = 0; i < Vec<T>::kCount; ++i) r.v[i] = a.v[i] op b.v[i]; \
    return r;                                                           \
  }                                                                     \
  template <class T>                                                    \
  inline Vec<T> operator op(const Vec<T>& a, T b) {                     \
    Vec<T> r;                                                           \
    for (int i = 0; i < Vec<T>::kCount; ++i) r.v[i] = a.v[i] op b;      \
    return r;                                                           \
  }
BNEXT_VEC_OPERATOR(+)
BNEXT_VEC_OPERATOR(-)
BNEXT_VEC_OPERATOR(*)
BNEXT_VEC_OPERATOR(/)
#undef BNEXT_VEC_OPERATOR

// a * b + c, one rounding where the instruction set has it. Written out, and the file compiled
// without contraction, so that forward and backward agree bit for bit.
template <class Native>
inline Native fma_native(const Native& a, const Native& b, const Native& c) {
#if defined(__AVX512F__)
  if constexpr (sizeof a[0] == 4)
    return _mm512_fmadd_ps(a, b, c);
  else
    return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  if constexpr (sizeof a[0] == 4)
    return _mm256_fmadd_ps(a, b, c);
  else
    return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  if constexpr (sizeof a[0] == 4)
    return vfmaq_f32(c, a, b);
  else
    return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}
template <class T>
inline Vec<T> fma(const Vec<T>& a, const Vec<T>& b, const Vec<T>& c) {
  Vec<T> r;
  for (int i = 0; i < Vec<T>::kCount; ++i) r.v[i] = fma_native(a.v[i], b.v[i], c.v[i]);
  return r;
}

// A condition of each lane: all ones where it holds.
template <class T>
struct Condition {
  using integer = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  Vec<integer> mask;
};

#define BNEXT_VEC_COMPARISON(op)                                             \
  template <class T>                                                         \
  inline Condition<T> operator op(const Vec<T>& a, const Vec<T>& b) {        \
    Condition<T> s;                                                          \
    for (int i = 0; i < Vec<T>::kCount; ++i) s.mask.v[i] = a.v[i] op b.v[i]; \
    return s;                                                                \
  }
BNEXT_VEC_COMPARISON(<)
BNEXT_VEC_COMPARISON(<=)
#undef BNEXT_VEC_COMPARISON
template <class T>
inline Condition<T> operator&(const Condition<T>& a, const Condition<T>& b) {
  Condition<T> s;
  for (int i = 0; i < Vec<T>::kCount; ++i) s.mask.v[i] = a.mask.v[i] & b.mask.v[i];
  return s;
}
template <class T>
inline Condition<T> operator!(const Condition<T>& a) {
  Condition<T> s;
  for (int i = 0; i < Vec<T>::kCount; ++i) s.mask.v[i] = ~a.mask.v[i];
  return s;
}

// Lane by lane.
template <class T>
inline Vec<T> select(const Condition<T>& condition, const Vec<T>& yes, const Vec<T>& no) {
  Vec<T> r;
  for (int i = 0; i < Vec<T>::kCount; ++i) r.v[i] = condition.mask.v[i] ? yes.v[i] : no.v[i];
  return r;
}

// One bit per lane, lane i in bit i.
template <class T>
inline uint32_t to_bits(const Condition<T>& s) {
  constexpr int lanes = kLanes / Vec<T>::kCount;
#if defined(__aarch64__)
  using Integer = typename Condition<T>::integer;
  typename Vec<Integer>::native sum{};
  for (int i = 0; i < Vec<T>::kCount; ++i) {
    typename Vec<Integer>::native bit;
    for (int j = 0; j < lanes; ++j) bit[j] = Integer{1} << (i * lanes + j);
    sum |= s.mask.v[i] & bit;
  }
  if constexpr (sizeof(T) == 4)
    return vaddvq_u32((uint32x4_t)sum);
  else
    return static_cast<uint32_t>(vaddvq_u64((uint64x2_t)sum));
#else
  uint32_t bits = 0;
  for (int i = 0; i < Vec<T>::kCount; ++i) {
#if defined(__AVX512DQ__)
    if constexpr (sizeof(T) == 4) bits |= _mm512_movepi32_mask((__m512i)s.mask.v[i]) << (i * lanes);
    if constexpr (sizeof(T) == 8) bits |= _mm512_movepi64_mask((__m512i)s.mask.v[i]) << (i * lanes);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) bits |= _mm256_movemask_ps((__m256)s.mask.v[i]) << (i * lanes);
    if constexpr (sizeof(T) == 8) bits |= _mm256_movemask_pd((__m256d)s.mask.v[i]) << (i * lanes);
#else
    for (int j = 0; j < lanes; ++j) bits |= (s.mask.v[i][j] & 1u) << (i * lanes + j);
#endif
  }
  return bits;
#endif
}

inline Vec<double> to_double(const Vec<double>& x) {
  return x;
}
inline Vec<double> to_double(const Vec<float>& x) {
  Vec<double> r;
#if defined(__AVX512F__)
  const __m256d high = _mm512_extractf64x4_pd((__m512d)x.v[0], 1);
  r.v[0] = _mm512_cvtps_pd(_mm512_castps512_ps256(x.v[0]));
  r.v[1] = _mm512_cvtps_pd((__m256)high);
#elif defined(__AVX2__)
  r.v[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(x.v[0]));
  r.v[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(x.v[0], 1));
#elif defined(__aarch64__)
  for (int i = 0; i < Vec<float>::kCount; ++i) {
    r.v[2 * i] = vcvt_f64_f32(vget_low_f32(x.v[i]));
    r.v[2 * i + 1] = vcvt_high_f64_f32(x.v[i]);
  }
#else
  constexpr int lanes = kLanes / Vec<double>::kCount;
  typedef float part_t __attribute__((vector_size(lanes * sizeof(float))));
  for (int i = 0; i < Vec<double>::kCount; ++i) {
    part_t part;
    std::memcpy(&part, reinterpret_cast<const char*>(&x) + i * sizeof part, sizeof part);
    r.v[i] = __builtin_convertvector(part, typename Vec<double>::native);
  }
#endif
  return r;
}

template <class A, class T>
inline Vec<A> convert(const Vec<T>& x) {
  if constexpr (std::is_same_v<A, T>)
    return x;
  else
    return to_double(x);
}

// The sum over lanes, in a fixed order.
inline double sum_lanes(const Vec<double>& x) {
  Vec<double>::native sum = x.v[0];
  for (int i = 1; i < Vec<double>::kCount; ++i) sum = sum + x.v[i];
  constexpr int lanes = kLanes / Vec<double>::kCount;
  double total = 0;
  for (int i = 0; i < lanes; i += 2) total += sum[i] + sum[i + 1];
  return total;
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
