// Elements and per-channel values on the device: compute types, items of several elements,
// parameters of a run-time dtype, bits of an activation's mask.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "plan.h"

namespace bnext {

template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

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

__device__ inline double relu(double z) {
  return z <= 0 ? 0 : z;
}

// The elements of one access. 2-byte elements stay in pairs.
template <class T, int V>
struct alignas(sizeof(T) * V) Item {
  static_assert(V <= kMaskBits && kMaskBits % V == 0, "a byte of a mask holds whole items' bits");
  using C = compute_t<T>;
  static constexpr bool kPairs = sizeof(T) == 2 && V > 1;
  static constexpr int kUnits = kPairs ? V / 2 : V;
  using Unit = std::conditional_t<kPairs, unsigned, T>;
  Unit units[kUnits];

  __device__ void unpack(C (&x)[V]) const {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if constexpr (kPairs)
        bnext::unpack(units[i], T{}, x[2 * i], x[2 * i + 1]);
      else
        x[i] = to_compute(units[i]);
    }
  }
  // kRelu: of what a ReLU makes of the values.
  template <bool kRelu = false>
  __device__ static Item pack(const C (&y)[V]) {
    Item item;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if constexpr (kPairs)
        item.units[i] = bnext::pack<kRelu>(y[2 * i], y[2 * i + 1], T{});
      else
        item.units[i] = from_compute<T>(kRelu ? relu(y[i]) : y[i]);
    }
    return item;
  }
  // Which elements are not zero, of an item without negative ones: bit v for element v.
  __device__ unsigned nonzero() const {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if constexpr (kPairs)
        bits |= nonzero_halves(units[i]) & (1u << (2 * i) | 1u << (2 * i + 17));
      else
        bits |= static_cast<unsigned>(to_compute(units[i]) != 0) << i;
    }
    return kPairs ? (bits | bits >> 16) : bits;
  }
  // Elements whose bits are not set become zero, or another item's.
  __device__ void keep(unsigned bits, const Item& other = {}) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if constexpr (kPairs) {
        // The signs of a product's four bytes are four of the bits.
        const unsigned kept = halves_of_signs((bits >> i / 2 * 4 & 15) * 0x10204080u, i % 2 * 2);
        units[i] = (units[i] & kept) | (other.units[i] & ~kept);
      } else {
        units[i] = bits >> i & 1 ? units[i] : other.units[i];
      }
    }
  }
};

template <class C>
__device__ inline C add(C x, C y) {
  return x + y;
}
template <class C>
__device__ inline C multiply(C x, C y) {
  return x * y;
}
template <class C>
__device__ inline C multiply_add(C x, C y, C z) {
  return fma(x, y, z);
}

// Elements v and maybe the next: a number, or a float2.
template <int kLanes, class C, int V>
__device__ inline auto lanes(const C (&x)[V], int v) {
  if constexpr (kLanes == 2)
    return float2{x[v], x[v + 1]};
  else
    return x[v];
}
template <class C, int V>
__device__ inline void set_lanes(C (&to)[V], int v, C x) {
  to[v] = x;
}
template <int V>
__device__ inline void set_lanes(float (&to)[V], int v, float2 x) {
  to[v] = x.x, to[v + 1] = x.y;
}

// to = f(from...), element by element, in pairs where all have those: f takes a float2 as it takes
// a number. Operands of fewer elements repeat.
template <class C, int V, class F, int... kOf>
__device__ inline void for_each(C (&to)[V], const F& f, const C (&... from)[kOf]) {
  constexpr int kStep = V % 2 == 0 && (... && (kOf % 2 == 0)) ? 2 : 1;
#pragma unroll
  for (int v = 0; v < V; v += kStep) set_lanes(to, v, f(lanes<kStep>(from, v % kOf)...));
}
template <class C, int V, int kOf>
__device__ inline void add_to(C (&to)[V], const C (&more)[kOf]) {
  for_each(to, [](auto x, auto y) { return add(x, y); }, to, more);
}

// Stores those elements of an item whose bits are set.
template <class T, int V>
__device__ inline void store_some(T* to, const Item<T, V>& item, unsigned bits) {
#pragma unroll
  for (int v = 0; v < V; ++v)
    if (bits >> v & 1) store(to + v, reinterpret_cast<const T*>(&item)[v]);
}

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

// A running statistic takes in a batch's by its weight.
__device__ inline void move_running(ParamOut running, int64_t c, double factor, double value) {
  if (!running) return;
  const double old = read(ParamIn{running.data, running.stride, running.dtype}, c, 0);
  write(running, c, (1 - factor) * old + factor * value);
}

// Threads whose items share a byte of the mask lie side by side (see items.cuh).
template <int V>
inline constexpr int kThreadsPerMaskByte = kMaskBits / V;

// The byte made of the V bits of this thread and of its neighbours; whole warps call it.
template <int V>
__device__ inline unsigned join_mask_bits(unsigned bits) {
  constexpr int kThreads = kThreadsPerMaskByte<V>;
  if constexpr (kThreads == 1) return bits;
  bits <<= V * (threadIdx.x % kThreads);
#pragma unroll
  for (int d = 1; d < kThreads; d *= 2) bits |= shuffle_xor(bits, d);
  return bits;
}

}  // namespace bnext
