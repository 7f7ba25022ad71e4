// Elements and per-channel values on the device: compute types, accesses of several elements,
// parameters of a run-time dtype, bits of a ReLU mask.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "plan.h"

namespace bnext {

template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

__device__ inline float to_compute(float x) {
  return x;
}
__device__ inline double to_compute(double x) {
  return x;
}
__device__ inline float to_compute(float16 x) {
  return to_float(x);
}
__device__ inline float to_compute(bfloat16 x) {
  return to_float(x);
}

template <class T, class C>
__device__ inline T from_compute(C x) {
  if constexpr (sizeof(T) == 2) {
    T y;
    from_float(static_cast<float>(x), y);
    return y;
  } else {
    return static_cast<T>(x);
  }
}

// The elements of one access. 2-byte elements stay in pairs, which take half the registers.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  static_assert(kMaskBits % V == 0, "a byte of a mask holds the bits of whole packs");
  static constexpr bool kPairs = sizeof(T) == 2 && V > 1;
  using Unit = std::conditional_t<kPairs, unsigned, T>;
  Unit units[kPairs ? V / 2 : V];

  __device__ compute_t<T> get(int v) const {
    if constexpr (kPairs) {
      const unsigned short bits = static_cast<unsigned short>(units[v / 2] >> (16 * (v % 2)));
      return to_compute(reinterpret_cast<const T&>(bits));
    } else {
      return to_compute(units[v]);
    }
  }
  __device__ void set(int v, compute_t<T> value) {
    const T element = from_compute<T>(value);
    if constexpr (kPairs) {
      const unsigned bits = reinterpret_cast<const unsigned short&>(element);
      units[v / 2] = v % 2 ? units[v / 2] | bits << 16 : bits;  // in ascending order of v
    } else {
      units[v] = element;
    }
  }
  // Sets element v to zero unless it passes.
  __device__ void keep(int v, bool passes) {
    if constexpr (kPairs) {
      if (!passes) units[v / 2] &= v % 2 ? 0xffffu : 0xffff0000u;
    } else if (!passes) {
      units[v] = from_compute<T>(compute_t<T>(0));
    }
  }
};

__device__ inline double read(ParamIn p, int64_t c, double absent) {
  if (!p) return absent;
  return visit_dtype<bfloat16, float16>(p.dtype, [&](auto t) -> double {
    return to_compute(static_cast<const decltype(t)*>(p.data)[c * p.stride]);
  });
}

__device__ inline void write(ParamOut p, int64_t c, double value) {
  if (!p) return;
  visit_dtype<bfloat16, float16>(p.dtype, [&](auto t) {
    static_cast<decltype(t)*>(p.data)[c * p.stride] = from_compute<decltype(t)>(value);
  });
}

// Threads whose items share a byte of the mask are adjacent (see RowItems, ColumnItems).
template <int V>
inline constexpr int kThreadsPerMaskByte = kMaskBits / V;

// The byte made of the V bits of this thread and of its neighbours; whole warps call it.
template <int V>
__device__ inline unsigned join_mask_bits(unsigned bits) {
  constexpr int kThreads = kThreadsPerMaskByte<V>;
  bits <<= V * (threadIdx.x % kThreads);
  for (int d = 1; d < kThreads; d *= 2) bits |= shuffle_xor(bits, d);
  return bits;
}

// This thread's V bits of a byte.
template <int V>
__device__ inline unsigned own_mask_bits(unsigned byte) {
  return byte >> (V * (threadIdx.x % kThreadsPerMaskByte<V>));
}

}  // namespace bnext
