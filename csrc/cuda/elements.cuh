// Elements and per-channel values on the device: compute types, accesses of several elements,
// parameters of a run-time dtype, bits of a ReLU mask.
#pragma once

#include "../batch_norm.h"
#include "../plan.h"
#include "device.cuh"

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

// The elements of one access.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

__device__ inline double read(ParamIn p, int64_t c, double absent) {
  if (!p) return absent;
  const int64_t i = c * p.stride;
  switch (p.dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(p.data)[i];
    case DType::kFloat16:
      return to_float(static_cast<const float16*>(p.data)[i]);
    case DType::kBFloat16:
      return to_float(static_cast<const bfloat16*>(p.data)[i]);
    default:
      return static_cast<const float*>(p.data)[i];
  }
}

__device__ inline void write(ParamOut p, int64_t c, double value) {
  if (!p) return;
  const int64_t i = c * p.stride;
  switch (p.dtype) {
    case DType::kFloat64:
      static_cast<double*>(p.data)[i] = value;
      break;
    case DType::kFloat16:
      static_cast<float16*>(p.data)[i] = from_compute<float16>(value);
      break;
    case DType::kBFloat16:
      static_cast<bfloat16*>(p.data)[i] = from_compute<bfloat16>(value);
      break;
    default:
      static_cast<float*>(p.data)[i] = static_cast<float>(value);
  }
}

// What a ReLU passes: NaN too.
template <class C>
__device__ inline bool passes_relu(C z) {
  return !(z <= C(0));
}

// The threads whose items share a byte of the mask lie side by side (see RowItems, ColumnItems).
template <int V>
inline constexpr int kThreadsPerMaskByte = kMaskBits / V;

// The byte that the V bits of this thread and of its neighbours make up; whole warps call it.
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
