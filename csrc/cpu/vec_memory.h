// Loads and stores of the four dtypes as vectors of the compute type.
// Compiled per instruction set, as vec.h.
#pragma once

#include "vec.h"

namespace bnext::BNEXT_ISA_NAMESPACE {

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> r;
  std::memcpy(&r, p, sizeof r);
  return r;
}

// 16-bit words to 32-bit ones and back. Written out where gcc 12 takes five instructions for one.
template <class Word, class Half>
inline Word widen(const Half& x) {
#if defined(__AVX512F__)
  return (Word)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (Word)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Word);
#endif
}

template <class Half, class Word>
inline Half narrow(const Word& x) {
#if defined(__AVX512F__)
  return (Half)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
  return (Half)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x),
                                _mm256_extracti128_si256((__m256i)x, 1));
#else
  return __builtin_convertvector(x, Half);
#endif
}

inline Vec<float> load(const bfloat16* p) {
  Vec<float> r;
  constexpr int lanes = kLanes / Vec<float>::kCount;
  typedef uint16_t half_t __attribute__((vector_size(lanes * 2)));
  typedef uint32_t word_t __attribute__((vector_size(lanes * 4)));
  for (int i = 0; i < Vec<float>::kCount; ++i) {
    half_t part;
    std::memcpy(&part, p + i * lanes, sizeof part);
    r.v[i] = (typename Vec<float>::native)(widen<word_t>(part) << 16);
  }
  return r;
}

inline Vec<float> load(const float16* p) {
  Vec<float> r;
#if defined(__AVX512F__)
  r.v[0] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
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

// The bytes of kLanes elements of T, ready to be stored.
template <class T>
struct Packed {
  alignas(kVectorBytes) unsigned char bytes[kLanes * sizeof(T)];
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
      const half_t part = narrow<half_t>(x.v[i] == x.v[i] ? rounded : quiet_nan);
      std::memcpy(r.bytes + i * sizeof part, &part, sizeof part);
    }
  } else if constexpr (std::is_same_v<T, float16>) {
#if defined(__AVX512F__)
    const __m256i half = _mm512_cvtps_ph(x.v[0], _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(r.bytes, &half, sizeof half);
#elif defined(__F16C__)
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

// Past the caches, where the instruction set can; p is aligned to kLanes elements.
template <class T>
inline void store_nontemporal(T* p, const Vec<compute_t<T>>& x) {
#if defined(__x86_64__)
  const Packed<T> packed = pack<T>(x);
#if defined(__AVX512F__)
  constexpr size_t step = sizeof packed.bytes < 64 ? 32 : 64;
#elif defined(__AVX__)
  constexpr size_t step = sizeof packed.bytes < 32 ? 16 : 32;
#else
  constexpr size_t step = 16;
#endif
  for (size_t i = 0; i < sizeof packed.bytes; i += step) {
    char* to = reinterpret_cast<char*>(p) + i;
    const auto from = packed.bytes + i;
#if defined(__AVX512F__)
    if constexpr (step == 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#endif
#if defined(__AVX__)
    if constexpr (step == 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#endif
    if constexpr (step == 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
#else
  store(p, x);
#endif
}

inline void prefetch(const void* p) {
  __builtin_prefetch(p, 0, 2);
}
inline void prefetch_for_store(const void* p) {
  __builtin_prefetch(p, 1, 2);
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
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  alignas(kVectorBytes) T lanes[kLanes];
  if constexpr (sizeof(T) == 2)
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes),
                       _mm256_maskz_loadu_epi16(first_bits(n), p));
  else if constexpr (sizeof(T) == 4)
    _mm512_store_si512(lanes, _mm512_maskz_loadu_epi32(first_bits(n), p));
  else
    for (int i = 0; i < 2; ++i)
      _mm512_store_si512(lanes + 8 * i,
                         _mm512_maskz_loadu_epi64(first_bits(n) >> 8 * i, p + 8 * i));
#else
  T lanes[kLanes] = {};
#pragma GCC unroll 1
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
#endif
  return load(lanes);
}

template <class T>
inline void store_first(T* p, const Vec<compute_t<T>>& x, int n) {
  alignas(kVectorBytes) T lanes[kLanes];
  store(lanes, x);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) == 2)
    _mm256_mask_storeu_epi16(p, first_bits(n),
                             _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes)));
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_epi32(p, first_bits(n), _mm512_load_si512(lanes));
  else
    for (int i = 0; i < 2; ++i)
      _mm512_mask_storeu_epi64(p + 8 * i, first_bits(n) >> 8 * i, _mm512_load_si512(lanes + 8 * i));
#else
#pragma GCC unroll 1
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
