// For builds of the kernels of float32 alone: what the launchers call for other dtypes.
#include "../../csrc/cuda/launch.cuh"

namespace bnext {

template <class T>
cudaError_t launch_as(const CudaPlan&, const Problem&, const ForwardArgs&, void*, void*) {
  return cudaErrorInvalidValue;
}
template <class T>
cudaError_t launch_as(const CudaPlan&, const Problem&, const BackwardArgs&, void*, void*) {
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t launch_as(const CudaPlan&, const Problem&, const DoubleBackwardArgs&, void*, void*) {
  return cudaErrorInvalidValue;
}

#define BNEXT_NO_KERNELS(T)                                                                      \
  template cudaError_t launch_as<T>(const CudaPlan&, const Problem&, const ForwardArgs&, void*,  \
                                    void*);                                                      \
  template cudaError_t launch_as<T>(const CudaPlan&, const Problem&, const BackwardArgs&, void*, \
                                    void*);                                                      \
  template cudaError_t launch_as<T>(const CudaPlan&, const Problem&, const DoubleBackwardArgs&,  \
                                    void*, void*);
BNEXT_NO_KERNELS(double)
BNEXT_NO_KERNELS(bfloat16)
BNEXT_NO_KERNELS(float16)

}  // namespace bnext
