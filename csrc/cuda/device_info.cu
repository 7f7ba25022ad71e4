// Includes the CUDA runtime.
#include "device_info.h"

#include <cuda_runtime.h>

namespace bnext {
namespace {

__global__ void empty_kernel() {}

// Whether clusters of this many of the largest blocks can run on the current device.
bool admits_cluster(const CudaInfo& info, int blocks) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kMaxCudaThreads);
  config.dynamicSmemBytes = static_cast<size_t>(info.shared_bytes_per_block);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, empty_kernel, &config);
  if (error != cudaSuccess) cudaGetLastError();  // forget it: an answer, not a failure
  return error == cudaSuccess && clusters > 0;
}

cudaError_t query_current_device(int device, CudaInfo& info) {
  cudaError_t error = cudaSuccess;
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
    return value;
  };
  info.capability = 10 * ask(cudaDevAttrComputeCapabilityMajor);
  info.capability += ask(cudaDevAttrComputeCapabilityMinor);
  info.sms = ask(cudaDevAttrMultiProcessorCount);
  info.shared_bytes_per_sm = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  info.shared_bytes_per_block = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  info.l2_bytes = ask(cudaDevAttrL2CacheSize);
  info.max_cluster_blocks = 1;
  if (!ask(cudaDevAttrClusterLaunch) || error != cudaSuccess) return error;
  // The driver may have compiled PTX of a GPU without clusters: what kernels were compiled for
  // counts.
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, empty_kernel);
  if (error != cudaSuccess || attributes.ptxVersion < 90) return error;
  error = cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(info.shared_bytes_per_block));
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  for (int blocks = 16; blocks > 1 && info.max_cluster_blocks == 1; blocks /= 2)
    if (admits_cluster(info, blocks)) info.max_cluster_blocks = blocks;
  return error;
}

}  // namespace

int query_cuda_info(int device, CudaInfo& info) {
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  error = query_current_device(device, info);
  const cudaError_t restored = cudaSetDevice(current);
  return error != cudaSuccess ? error : restored;
}

#define BNEXT_STRING(number) #number
#define BNEXT_STRING_OF(macro) BNEXT_STRING(macro)

const char* cuda_error_string(int error) {
  if (error == cudaErrorInsufficientDriver)
    return "the driver is older than the CUDA that bnext was built with (CUDART_VERSION "
           BNEXT_STRING_OF(CUDART_VERSION) "; CUDA 13 needs driver 580 or newer), whatever CUDA "
           "torch has";
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace bnext
