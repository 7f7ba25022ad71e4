// Launches the double backward's kernels for one dtype, BNEXT_TYPE; setup.py compiles this file for
// each.
#include "double_backward.cuh"
#include "launch.cuh"

namespace bnext {

template <class T>
cudaError_t launch_as(const CudaPlan& plan, const Problem& problem, const DoubleBackwardArgs& args,
                      void* workspace, void* stream) {
  DoubleBackwardCall call{problem, plan, args, workspace, 0};
  return with_items<T>(plan, [&](auto v, auto map, auto ends) {
    if constexpr (v > kMaxDoubleBackwardVector) {
      return cudaErrorInvalidValue;
    } else {
      return for_each_range(plan, [&](int64_t first, int64_t groups) {
        call.first_group = first;
        const LaunchShape shape = shape_of(plan, groups);
        const cudaError_t error =
            launch(batch_norm_reduce_double_backward_kernel<T, v, map, ends>, shape, stream, call);
        if (error != cudaSuccess) return error;
        return launch(batch_norm_apply_double_backward_kernel<T, v, map, ends>, shape, stream,
                      call);
      });
    }
  });
}

template cudaError_t launch_as<BNEXT_TYPE>(const CudaPlan&, const Problem&,
                                           const DoubleBackwardArgs&, void*, void*);

}  // namespace bnext
