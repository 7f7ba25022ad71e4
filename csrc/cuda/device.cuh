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

// Barriers for the threads of a block, of a cluster and of a cooperative launch. Each orders the
// memory that they share: shared, distributed shared, global.
__device__ inline void sync_block() {
  __syncthreads();
}

__device__ inline void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
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

// For data that this kernel does not touch again: it is the first to leave the caches.
template <class T>
__device__ inline T load_streaming(const T* global) {
  using W = typename Word<sizeof(T)>::type;
  const W word = __ldcs(reinterpret_cast<const W*>(global));
  return reinterpret_cast<const T&>(word);
}
template <class T>
__device__ inline void store_streaming(T* global, const T& value) {
  using W = typename Word<sizeof(T)>::type;
  __stcs(reinterpret_cast<W*>(global), reinterpret_cast<const W&>(value));
}

struct LaunchShape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int cluster_blocks = 1;
  bool cooperative = false;
};

template <class Args>
inline cudaError_t launch(void (*kernel)(Args), const LaunchShape& shape, void* stream,
                          const Args& args) {
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > 48 * 1024)  // more than a GPU grants unasked
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shape.shared_bytes));
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
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace bnext

#endif  // __CUDACC__
