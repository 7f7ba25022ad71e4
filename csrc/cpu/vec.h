// Eight lanes of float or double on whatever vectors the instruction set has, with loads and stores of the
// four dtypes. Always eight, so that every instruction set sums in the same order.
// Compiled once per instruction set; everything lives in that set's namespace, because a shared inline
// function might be taken from the object file that needs the newest CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bnext::BNEXT_ISA_NAMESPACE {

inline constexpr int kLanes = 8;

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
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
  static constexpr int kBytes = kLanes * sizeof(T) < kVectorBytes ? kLanes * sizeof(T) : kVectorBytes;
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
#undef BNEXT_VEC_OPERATOR

// a * b + c, one rounding where the instruction set has it. Written out, and the file compiled without
// contraction, so that forward and backward agree bit for bit.
inline Vec<float> fma(const Vec<float>& a, const Vec<float>& b, const Vec<float>& c) {
#if defined(__FMA__)
  Vec<float> r;
  r.v[0] = _mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]);
  return r;
#else
  return a * b + c;
#endif
}

inline Vec<double> fma(const Vec<double>& a, const Vec<double>& b, const Vec<double>& c) {
#if defined(__AVX512F__)
  Vec<double> r;
  r.v[0] = _mm512_fmadd_pd(a.v[0], b.v[0], c.v[0]);
  return r;
#elif defined(__FMA__)
  Vec<double> r;
  for (int i = 0; i < Vec<double>::kCount; ++i) r.v[i] = _mm256_fmadd_pd(a.v[i], b.v[i], c.v[i]);
  return r;
#else
  return a * b + c;
#endif
}

// All ones in the lanes where not (x <= 0): those a ReLU passes, NaN among them.
template <class T>
struct Sign {
  using integer = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  Vec<integer> mask;
};

template <class T>
inline Sign<T> passes_relu(const Vec<T>& x) {
  Sign<T> s;
  for (int i = 0; i < Vec<T>::kCount; ++i) s.mask.v[i] = ~(x.v[i] <= typename Vec<T>::native{});
  return s;
}

// Lanes of x that pass, zero elsewhere.
template <class T>
inline Vec<T> keep(const Sign<T>& sign, const Vec<T>& x) {
  Vec<T> r;
  for (int i = 0; i < Vec<T>::kCount; ++i)
    r.v[i] = sign.mask.v[i] ? x.v[i] : typename Vec<T>::native{};
  return r;
}

// The lanes with their bit set. Bit i of a mask byte is lane i.
template <class T>
inline Sign<T> from_bits(uint8_t bits) {
  using Integer = typename Sign<T>::integer;
  Sign<T> s;
  constexpr int lanes = kLanes / Vec<T>::kCount;
  for (int i = 0; i < Vec<T>::kCount; ++i) {
    typename Vec<Integer>::native bit;
    for (int j = 0; j < lanes; ++j) bit[j] = Integer{1} << (i * lanes + j);
    s.mask.v[i] = (bit & Integer{bits}) != 0;
  }
  return s;
}

template <class T>
inline Sign<T> first_lanes(int n) {
  return from_bits<T>(static_cast<uint8_t>((1 << n) - 1));
}

template <class T>
inline uint8_t to_bits(const Sign<T>& s) {
#if defined(__AVX512DQ__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) == 4) return _mm256_movepi32_mask((__m256i)s.mask.v[0]);
  if constexpr (sizeof(T) == 8) return _mm512_movepi64_mask((__m512i)s.mask.v[0]);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_movemask_ps((__m256)s.mask.v[0]);
  if constexpr (sizeof(T) == 8)
    return _mm256_movemask_pd((__m256d)s.mask.v[0]) | _mm256_movemask_pd((__m256d)s.mask.v[1]) << 4;
#endif
  uint8_t bits = 0;
  constexpr int lanes = kLanes / Vec<T>::kCount;
  for (int i = 0; i < kLanes; ++i) bits |= (s.mask.v[i / lanes][i % lanes] & 1) << i;
  return bits;
}

inline Vec<double> to_double(const Vec<double>& x) { return x; }
inline Vec<double> to_double(const Vec<float>& x) {
  Vec<double> r;
  constexpr int lanes = kLanes / Vec<double>::kCount;
  typedef float part_t __attribute__((vector_size(lanes * sizeof(float))));
  for (int i = 0; i < Vec<double>::kCount; ++i) {
    part_t part;
    std::memcpy(&part, reinterpret_cast<const char*>(&x) + i * sizeof part, sizeof part);
    r.v[i] = __builtin_convertvector(part, typename Vec<double>::native);
  }
  return r;
}

inline Vec<double> finite_or_zero(const Vec<double>& x) {
  Vec<double> r;
  for (int i = 0; i < Vec<double>::kCount; ++i)
    r.v[i] = x.v[i] - x.v[i] == 0 ? x.v[i] : typename Vec<double>::native{};
  return r;
}

// The sum over lanes, in a fixed order.
inline double horizontal_sum(const Vec<double>& x) {
  double lane[kLanes];
  std::memcpy(lane, &x, sizeof lane);
  return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> r;
  std::memcpy(&r, p, sizeof r);
  return r;
}

inline Vec<float> load(const bfloat16* p) {
  Vec<float> r;
  constexpr int lanes = kLanes / Vec<float>::kCount;
  typedef uint16_t half_t __attribute__((vector_size(lanes * 2)));
  typedef uint32_t word_t __attribute__((vector_size(lanes * 4)));
  for (int i = 0; i < Vec<float>::kCount; ++i) {
    half_t part;
    std::memcpy(&part, p + i * lanes, sizeof part);
    r.v[i] = (typename Vec<float>::native)(__builtin_convertvector(part, word_t) << 16);
  }
  return r;
}

inline Vec<float> load(const float16* p) {
  Vec<float> r;
#if defined(__F16C__)
  r.v[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  _Float16 half[kLanes];
  float lane[kLanes];
  std::memcpy(half, p, sizeof half);
  for (int i = 0; i < kLanes; ++i) lane[i] = half[i];
  std::memcpy(&r, lane, sizeof r);
#endif
  return r;
}

// The bytes of eight elements of T, ready to be stored.
template <class T>
struct Packed {
  alignas(16) unsigned char bytes[kLanes * sizeof(T)];
};

template <class T>
inline Packed<T> pack(const Vec<compute_t<T>>& x) {
  Packed<T> r;
  if constexpr (std::is_same_v<T, bfloat16>) {
    constexpr int lanes = kLanes / Vec<float>::kCount;
    typedef uint16_t half_t __attribute__((vector_size(lanes * 2)));
    typedef uint32_t word_t __attribute__((vector_size(lanes * 4)));
    for (int i = 0; i < Vec<float>::kCount; ++i) {
      const word_t bits = (word_t)x.v[i];
      const word_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
      const word_t quiet_nan = word_t{} + 0x7fc0;
      const half_t part =
          __builtin_convertvector(x.v[i] == x.v[i] ? rounded : quiet_nan, half_t);
      std::memcpy(r.bytes + i * sizeof part, &part, sizeof part);
    }
  } else if constexpr (std::is_same_v<T, float16>) {
#if defined(__F16C__)
    const __m128i half = _mm256_cvtps_ph(x.v[0], _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(r.bytes, &half, sizeof half);
#else
    float lane[kLanes];
    _Float16 half[kLanes];
    std::memcpy(lane, &x, sizeof lane);
    for (int i = 0; i < kLanes; ++i) half[i] = static_cast<_Float16>(lane[i]);
    std::memcpy(r.bytes, half, sizeof half);
#endif
  } else {
    std::memcpy(r.bytes, &x, sizeof r.bytes);
  }
  return r;
}

template <class T>
inline void store(T* p, const Vec<compute_t<T>>& x) {
  const Packed<T> packed = pack<T>(x);
  std::memcpy(p, packed.bytes, sizeof packed.bytes);
}

// Past the caches, where the instruction set can; p is aligned to the vector.
template <class T>
inline void store_nontemporal(T* p, const Vec<compute_t<T>>& x) {
#if defined(__x86_64__)
  const Packed<T> packed = pack<T>(x);
  for (size_t i = 0; i < sizeof packed.bytes; i += 16) {
    __m128i part;
    std::memcpy(&part, packed.bytes + i, sizeof part);
    _mm_stream_si128(reinterpret_cast<__m128i*>(reinterpret_cast<char*>(p) + i), part);
  }
#else
  store(p, x);
#endif
}

// Orders non-temporal stores before whatever the thread does next.
inline void fence_nontemporal() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The first n < kLanes lanes; the others read as zero and are not written.
template <class T>
inline Vec<compute_t<T>> load_first(const T* p, int n) {
  T lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class T>
inline void store_first(T* p, const Vec<compute_t<T>>& x, int n) {
  T lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
