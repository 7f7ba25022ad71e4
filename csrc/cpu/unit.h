// A unit: as many elements of a dtype as fill a register, as vectors of the compute type. Loads,
// stores, and the bits of a mask. Compiled per instruction set, as vec.h.
#pragma once

#include <utility>

#include "vec.h"

namespace bnext::BNEXT_ISA_NAMESPACE {

// f(0) ... f(kCount - 1) of constants: arrays that are indexed by them stay in registers, which gcc
// does not see through a loop in a loop.
template <int kCount, class F>
[[gnu::always_inline]] inline void unrolled(const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// Vectors and elements of a unit.
template <class T>
inline constexpr int kVecs = sizeof(T) == 2 ? 2 : 1;
template <class T>
inline constexpr int kUnit = kLanes * kVecs<T>;

template <class T>
struct Unit {
  Vec<compute_t<T>> v[kVecs<T>];
};

// The element that lies in a unit's lane. A bfloat16 becomes a float by a shift of the 32 bits that
// it shares with its neighbour, so one vector has the even elements and the other the odd ones.
template <class T>
constexpr int element_of(int lane) {
  return std::is_same_v<T, bfloat16> ? lane % kLanes * 2 + lane / kLanes : lane;
}

using Words = Vec<uint32_t>;

// A register from or to memory of any alignment. gcc 12 copies with memcpy by halves through the
// stack, which a load of the whole then waits for (bfloat16: 4 times the time).
template <class V>
struct __attribute__((packed, may_alias)) Unaligned {
  V v;
};
template <class V>
inline V load_register(const void* p) {
  return static_cast<const Unaligned<V>*>(p)->v;
}
template <class V>
inline void store_register(void* p, const V& v) {
  static_cast<Unaligned<V>*>(p)->v = v;
}

template <class T>
inline Vec<T> load(const void* p) {
  Vec<T> r;
  for (int i = 0; i < Vec<T>::kCount; ++i)
    r.v[i] =
        load_register<typename Vec<T>::native>(static_cast<const char*>(p) + i * Vec<T>::kBytes);
  return r;
}
template <class T>
inline Vec<T> load(const T* p) {
  return load<T>(static_cast<const void*>(p));
}
template <class T>
inline void store(T* p, const Vec<T>& x) {
  for (int i = 0; i < Vec<T>::kCount; ++i)
    store_register(reinterpret_cast<char*>(p) + i * Vec<T>::kBytes, x.v[i]);
}

template <class T>
inline Unit<T> load_unit(const T* p) {
  Unit<T> r;
  if constexpr (std::is_same_v<T, bfloat16>) {
    const Words pairs = load<uint32_t>(static_cast<const void*>(p));
    for (int i = 0; i < Words::kCount; ++i) {
      r.v[0].v[i] = (Vec<float>::native)(pairs.v[i] << 16);
      r.v[1].v[i] = (Vec<float>::native)(pairs.v[i] & 0xffff0000u);
    }
  } else if constexpr (std::is_same_v<T, float16>) {
    unrolled<2>([&](auto j) {
#if defined(__AVX512F__)
      r.v[j].v[0] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + j * kLanes)));
#elif defined(__F16C__)
      r.v[j].v[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + j * kLanes)));
#else
      _Float16 half[kLanes];
      float lane[kLanes];
      std::memcpy(half, p + j * kLanes, sizeof half);
      for (int i = 0; i < kLanes; ++i) lane[i] = half[i];
      r.v[j] = load(lane);
#endif
    });
  } else {
    r.v[0] = load(p);
  }
  return r;
}

// The registers of a unit, ready to be stored.
template <class T>
struct Packed {
  static constexpr int kBytes = kUnit<T> * sizeof(T), kCount = kBytes / kVectorBytes;
  typedef int32_t native __attribute__((vector_size(kVectorBytes)));
  native v[kCount];
};

// Some bfloat16 of a unit is NaN, which rounding by an addition could turn into an infinity.
inline bool any_nan(const Unit<bfloat16>& x) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(x.v[0].v[0], x.v[1].v[0], _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(x.v[0].v[0], x.v[1].v[0], _CMP_UNORD_Q)) != 0;
#else
  return (to_bits(x.v[0] <= x.v[0]) & to_bits(x.v[1] <= x.v[1])) != (1u << kLanes) - 1;
#endif
}

inline Words round_to_bfloat16(const Vec<float>& x, bool nan) {
  Words r;
  for (int i = 0; i < Words::kCount; ++i) {
    const Words::native bits = (Words::native)x.v[i];
    r.v[i] = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest even
    if (nan) r.v[i] = x.v[i] == x.v[i] ? r.v[i] : Words::native{} + 0x7fc00000u;
  }
  return r;
}

template <class T>
inline Packed<T> pack(const Unit<T>& x) {
  Packed<T> r;
  if constexpr (std::is_same_v<T, bfloat16>) {
    const bool nan = any_nan(x);
    Words even = round_to_bfloat16(x.v[0], false), odd = round_to_bfloat16(x.v[1], false);
    if (__builtin_expect(nan, false))
      even = round_to_bfloat16(x.v[0], true), odd = round_to_bfloat16(x.v[1], true);
    Words pairs;
    for (int i = 0; i < Words::kCount; ++i) {
#if defined(__AVX2__) && !defined(__AVX512F__)
      pairs.v[i] =
          (Words::native)_mm256_blend_epi16((__m256i)(even.v[i] >> 16), (__m256i)odd.v[i], 0xaa);
#else
      pairs.v[i] = (even.v[i] >> 16) | (odd.v[i] & 0xffff0000u);
#endif
    }
    for (int i = 0; i < Words::kCount; ++i) r.v[i] = (typename Packed<T>::native)pairs.v[i];
  } else if constexpr (std::is_same_v<T, float16>) {
#if defined(__AVX512F__)
    __m256i half[2];
    for (int j = 0; j < 2; ++j) half[j] = _mm512_cvtps_ph(x.v[j].v[0], _MM_FROUND_TO_NEAREST_INT);
    r.v[0] =
        (typename Packed<T>::native)_mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
#elif defined(__F16C__)
    __m128i half[2];
    for (int j = 0; j < 2; ++j) half[j] = _mm256_cvtps_ph(x.v[j].v[0], _MM_FROUND_TO_NEAREST_INT);
    r.v[0] = (typename Packed<T>::native)_mm256_set_m128i(half[1], half[0]);
#else
    float lane[kUnit<T>];
    _Float16 half[kUnit<T>];
    std::memcpy(lane, &x, sizeof lane);
    for (int i = 0; i < kUnit<T>; ++i) half[i] = static_cast<_Float16>(lane[i]);
    std::memcpy(&r, half, sizeof r);
#endif
  } else {
    for (int i = 0; i < Packed<T>::kCount; ++i) r.v[i] = (typename Packed<T>::native)x.v[0].v[i];
  }
  return r;
}

template <class V>
inline void stream_register(char* p, const V& v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  store_register(p, v);
#endif
}

// kNontemporal: past the caches, where the instruction set can; p is aligned to a register.
template <bool kNontemporal, class T>
inline void store_unit(T* p, const Unit<T>& x) {
  const Packed<T> packed = pack(x);
  for (int i = 0; i < Packed<T>::kCount; ++i) {
    char* const to = reinterpret_cast<char*>(p) + i * kVectorBytes;
    if constexpr (kNontemporal)
      stream_register(to, packed.v[i]);
    else
      store_register(to, packed.v[i]);
  }
}

// Orders non-temporal stores before whatever the thread does next.
inline void fence_nontemporal() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// A condition of each element of a unit; A is what is compared or kept.
template <class T, class A = compute_t<T>>
struct Mask {
  Condition<A> v[kVecs<T>];
};

// Element i's in bit i.
template <class T, class A = compute_t<T>>
inline Mask<T, A> from_bits(uint32_t bits) {
  using Integer = typename Condition<A>::integer;
  Mask<T, A> r;
  constexpr int lanes = kLanes / Vec<A>::kCount;
  unrolled<kVecs<T>>([&](auto j) {
    for (int i = 0; i < Vec<A>::kCount; ++i) {
      typename Vec<Integer>::native bit;
      for (int k = 0; k < lanes; ++k)
        bit[k] = static_cast<Integer>(int64_t{1} << element_of<T>(j * kLanes + i * lanes + k));
      r.v[j].mask.v[i] = (bit & static_cast<Integer>(bits)) != 0;
    }
  });
  return r;
}

template <class T>
inline uint32_t to_bits(const Mask<T>& mask) {
  if constexpr (kVecs<T> == 1) return to_bits(mask.v[0]);
  uint32_t bits[2];
  unrolled<kVecs<T>>([&](auto j) {
    bits[j] = to_bits(mask.v[j]);
    if constexpr (std::is_same_v<T, bfloat16>)  // between those of the other vector
      for (int step = 8; step > 0; step /= 2) {
        const uint32_t low = ~0u / ((1u << step) + 1);
        bits[j] = (bits[j] | bits[j] << step) & low;
      }
  });
  return bits[0] | bits[1] << (std::is_same_v<T, bfloat16> ? 1 : kLanes);
}

// Bits [first, first + kUnit) of a row of a mask. Rows start at whole bytes.
template <class T>
inline uint32_t read_bits(const uint8_t* row, int64_t first) {
  constexpr int bytes = kUnit<T> / 8;
  uint64_t bits = 0;
  std::memcpy(&bits, row + first / 8, bytes);
  if (first % 8 != 0) bits |= static_cast<uint64_t>(row[first / 8 + bytes]) << kUnit<T>;
  return static_cast<uint32_t>(bits >> first % 8);
}
// Those before `first` are kept.
template <class T>
inline void write_bits(uint8_t* row, int64_t first, uint32_t unit_bits) {
  constexpr int bytes = kUnit<T> / 8;
  uint8_t* const p = row + first / 8;
  uint64_t bits = unit_bits;
  if (first % 8 != 0) {
    bits = bits << first % 8 | (p[0] & ((1u << first % 8) - 1));
    p[bytes] = static_cast<uint8_t>(bits >> kUnit<T>);
  }
  std::memcpy(p, &bits, bytes);
}

// A unit's values from the order of its elements to the order of its lanes, and back; in place too.
template <class T, class A>
inline void to_lanes(const A* elements, A* lanes) {
  if constexpr (std::is_same_v<T, bfloat16>) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) {
      const __m512i even =
          _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
      const __m512 a = _mm512_loadu_ps(elements), b = _mm512_loadu_ps(elements + 16);
      _mm512_storeu_ps(lanes, _mm512_permutex2var_ps(a, even, b));
      _mm512_storeu_ps(lanes + 16,
                       _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b));
      return;
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(A) == 4) {
      const __m256 a = _mm256_loadu_ps(elements), b = _mm256_loadu_ps(elements + 8);
      const __m256 low = _mm256_permute2f128_ps(a, b, 0x20);
      const __m256 high = _mm256_permute2f128_ps(a, b, 0x31);
      _mm256_storeu_ps(lanes, _mm256_shuffle_ps(low, high, 0x88));
      _mm256_storeu_ps(lanes + 8, _mm256_shuffle_ps(low, high, 0xdd));
      return;
    }
#endif
    A in[kUnit<T>];
    std::memcpy(in, elements, sizeof in);
    for (int i = 0; i < kUnit<T>; ++i) lanes[i] = in[element_of<T>(i)];
  } else if (elements != lanes) {
    std::memcpy(lanes, elements, kUnit<T> * sizeof(A));
  }
}
template <class T, class A>
inline void to_elements(const A* lanes, A* elements) {
  if constexpr (std::is_same_v<T, bfloat16>) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) {
      const __m256 even = _mm256_loadu_ps(lanes), odd = _mm256_loadu_ps(lanes + 8);
      const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
      _mm256_storeu_ps(elements, _mm256_permute2f128_ps(low, high, 0x20));
      _mm256_storeu_ps(elements + 8, _mm256_permute2f128_ps(low, high, 0x31));
      return;
    }
#endif
    for (int i = 0; i < kUnit<T>; ++i) elements[element_of<T>(i)] = lanes[i];
  } else {
    std::memcpy(elements, lanes, kUnit<T> * sizeof(A));
  }
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
