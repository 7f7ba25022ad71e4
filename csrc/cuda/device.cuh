// The only file that calls the hardware for warps, clusters, distributed shared memory and
// asynchronous copies. The rest of a kernel is threadIdx, blockIdx and arithmetic, so tests/native
// can run the same kernels on a CPU by emulating this file.
#pragma once

#ifndef __CUDACC__
#include "emulation.h"
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <utility>

namespace bnext {

using float16 = __half;
using bfloat16 = __nv_bfloat16;

__device__ inline float to_float(float16 x) {
  return __half2float(x);
}
__device__ inline float to_float(bfloat16 x) {
  return __bfloat162float(x);
}
__device__ inline void from_float(float x, float16& y) {
  y = __float2half_rn(x);
}
__device__ inline void from_float(float x, bfloat16& y) {
  y = __float2bfloat16_rn(x);
}

// Two elements in a word, the first in its low half.
__device__ inline void unpack(unsigned word, float16, float& first, float& second) {
  const float2 both = __half22float2(reinterpret_cast<const __half2&>(word));
  first = both.x;
  second = both.y;
}
__device__ inline void unpack(unsigned word, bfloat16, float& first, float& second) {
  first = __uint_as_float(word << 16);
  second = __uint_as_float(word & 0xffff0000u);
}
template <bool kRelu>
__device__ inline unsigned pack(float first, float second, float16) {
  unsigned word;
  if constexpr (kRelu)
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
template <bool kRelu>
__device__ inline unsigned pack(float first, float second, bfloat16) {
  unsigned word;
  if constexpr (kRelu)
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
// z where it is above zero or NaN, else zero.
__device__ inline float relu(float z) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(z));
  return y;
}

// All bits of each half that is not zero; no half has a sign.
__device__ inline unsigned nonzero_halves(unsigned word) {
  return __hgtu2_mask(reinterpret_cast<const __half2&>(word), __half2half2(__ushort_as_half(0)));
}
// All bits of each half of `a` that is greater than b's, or NaN.
__device__ inline unsigned greater_halves(unsigned a, unsigned b, float16) {
  return __hgtu2_mask(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
}
__device__ inline unsigned greater_halves(unsigned a, unsigned b, bfloat16) {
  return __hgtu2_mask(reinterpret_cast<const __nv_bfloat162&>(a),
                      reinterpret_cast<const __nv_bfloat162&>(b));
}
// All bits of the low half where the sign of byte `low`, 0 or 2, is set, of the high half where
// that of the next byte is.
__device__ inline unsigned halves_of_signs(unsigned word, int low) {
  unsigned mask;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(mask) : "r"(word), "r"(low == 0 ? 0x9988 : 0xbbaa));
  return mask;
}
__device__ inline unsigned bits_of(float x) {
  return __float_as_uint(x);
}
__device__ inline float float_of(unsigned bits) {
  return __uint_as_float(bits);
}

// exp, within 2 units for arguments near 0; else the argument's rounding is added.
__device__ inline float quick_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
// 1 / x, within 1 unit.
__device__ inline float quick_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x + y, x y and x y + z of two floats each, rounded once: by one instruction of compute
// capability 10.x, and of no other.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 10
__device__ inline float2 add(float2 x, float2 y) {
  return __fadd2_rn(x, y);
}
__device__ inline float2 multiply(float2 x, float2 y) {
  return __fmul2_rn(x, y);
}
__device__ inline float2 multiply_add(float2 x, float2 y, float2 z) {
  return __ffma2_rn(x, y, z);
}
#else
__device__ inline float2 add(float2 x, float2 y) {
  return {x.x + y.x, x.y + y.y};
}
__device__ inline float2 multiply(float2 x, float2 y) {
  return {x.x * y.x, x.y * y.y};
}
__device__ inline float2 multiply_add(float2 x, float2 y, float2 z) {
  return {fmaf(x.x, y.x, z.x), fmaf(x.y, y.y, z.y)};
}
#endif

// By any number of places.
__device__ inline unsigned shift_right(unsigned x, unsigned places) {
  asm("shr.b32 %0, %0, %1;" : "+r"(x) : "r"(places));
  return x;
}
__device__ inline unsigned multiply_high(unsigned a, unsigned b) {
  return __umulhi(a, b);
}
// A value whose origin the compiler forgets: or it takes a product or a sum apart again, item by
// item.
__device__ inline unsigned opaque(unsigned x) {
  asm("" : "+r"(x));
  return x;
}
template <class T>
__device__ inline T* opaque(T* global) {
  asm("" : "+l"(global));
  __builtin_assume(__isGlobal(global));
  return global;
}
// Of a power of two.
__device__ inline int log2_of(int power) {
  return 31 - __clz(power);
}
// The same at every call: what is read by it is read again, and takes no registers in between.
__device__ inline unsigned opaque_again(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Barriers of all threads of a block, of a cluster's blocks, of a cooperative launch's blocks. Each
// orders the memory they share: shared, distributed shared, global.
__device__ inline void sync_block() {
  __syncthreads();
}

// A barrier of the block, and whether any of its threads says so.
__device__ inline bool any_of_block(bool says) {
  return __syncthreads_or(says);
}

__device__ inline void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __trap();  // the plan forms clusters for code of 9.0 and newer only
#endif
}
// A barrier in halves, which orders no memory: for the end of reading another block's.
__device__ inline void arrive_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
  __trap();
#endif
}
__device__ inline void wait_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#else
  __trap();
#endif
}

__device__ inline void sync_grid() {
  cooperative_groups::this_grid().sync();
}

// The v of the thread whose index in the warp differs in `thread_bits`; all 32 threads call it.
template <class T>
__device__ inline T shuffle_xor(T v, int thread_bits) {
  return __shfl_xor_sync(0xffffffffu, v, thread_bits);
}

// The dynamic shared memory of this block, 16-byte aligned.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// The same object in the shared memory of another block of the cluster, while that block runs.
template <class T>
__device__ inline T* in_block_of_cluster(T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
  __trap();
  return shared;
#endif
}

// Asynchronous copies of 4, 8 or 16 aligned bytes from global to shared memory. After
// wait_for_copies the calling thread sees its own copies; other threads need a barrier too.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global) {
  __pipeline_memcpy_async(shared, global, kBytes);
}
__device__ inline void commit_copies() {
  __pipeline_commit();
}
// Waits for all but the last kPending committed batches of this thread.
template <int kPending>
__device__ inline void wait_for_copies() {
  __pipeline_wait_prior(kPending);
}

// Words of 2, 4, 8 or 16 bytes, which one instruction loads or stores.
template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// A load of what this kernel does not touch again: the first to leave the caches.
template <class T>
__device__ inline T load_streaming(const T* global) {
  using W = typename Word<sizeof(T)>::type;
  const W word = __ldcs(reinterpret_cast<const W*>(global));
  return reinterpret_cast<const T&>(word);
}
// Others.
template <class T>
__device__ inline T load(const T* from) {
  using W = typename Word<sizeof(T)>::type;
  const W word = *reinterpret_cast<const W*>(from);
  return reinterpret_cast<const T&>(word);
}
template <class T>
__device__ inline void store(T* to, const T& value) {
  using W = typename Word<sizeof(T)>::type;
  *reinterpret_cast<W*>(to) = reinterpret_cast<const W&>(value);
}

// A store of what the next kernel reads. `Keep`: whether the L2 is to have it until then, or to
// give it up first.
class Keep {
 public:
  __device__ explicit Keep(bool keeps) {
    if (keeps)
      asm("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(policy_));
    else
      asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy_));
  }
  template <class T>
  __device__ void store(T* global, const T& value) const {
    using W = typename Word<sizeof(T)>::type;
    const W& w = reinterpret_cast<const W&>(value);
    if constexpr (sizeof(T) == 16)
      asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(global),
                   "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "l"(policy_)
                   : "memory");
    else if constexpr (sizeof(T) == 8)
      asm volatile("st.global.L2::cache_hint.v2.b32 [%0], {%1, %2}, %3;" ::"l"(global), "r"(w.x),
                   "r"(w.y), "l"(policy_)
                   : "memory");
    else if constexpr (sizeof(T) == 4)
      asm volatile("st.global.L2::cache_hint.b32 [%0], %1, %2;" ::"l"(global), "r"(w), "l"(policy_)
                   : "memory");
    else
      asm volatile("st.global.L2::cache_hint.b16 [%0], %1, %2;" ::"l"(global), "h"(w), "l"(policy_)
                   : "memory");
  }

 private:
  uint64_t policy_;
};

struct LaunchShape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int cluster_blocks = 1;
  bool cooperative = false;
};

// All the shared memory a kernel can have on the current device, asked for once: what it is must
// not depend on which of two threads asks last.
inline cudaError_t allow_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  if (allowed.count({kernel, device})) return cudaSuccess;
  error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess)  // two blocks an SM need all of it
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) allowed.insert({kernel, device});
  return error;
}

template <class Args>
inline cudaError_t launch(void (*kernel)(Args), const LaunchShape& shape, void* stream,
                          const Args& args) {
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > 48 * 1024)  // beyond what every GPU grants unasked
    error = allow_shared_memory(reinterpret_cast<const void*>(kernel));
  if (error == cudaSuccess && shape.cluster_blocks > 8)  // beyond the portable size
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (shape.cluster_blocks > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(shape.cluster_blocks), 1,
                                                    1};
  }
  if (shape.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  error = cudaLaunchKernelEx(&config, kernel, args);
  if (error != cudaSuccess) cudaGetLastError();  // or the next op, torch's, would report it
  return error;
}

}  // namespace bnext

#endif  // __CUDACC__
