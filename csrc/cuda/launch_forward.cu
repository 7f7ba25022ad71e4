// Launches the forward kernels for one dtype, BNEXT_TYPE; setup.py compiles this file for each.
#include "forward.cuh"
#include "launch.cuh"

namespace bnext {

template <class T>
cudaError_t launch_as(const CudaPlan& plan, const Problem& problem, const ForwardArgs& args,
                      void* workspace, void* stream) {
  ForwardCall call{problem, plan, args, workspace, 0};
  return with_items<T>(plan, [&](auto v, auto map, auto ends) {
    if constexpr (is_sliced(map, ends) && v > 1 && !Loops<T, v, map>::kMasks) {
      return cudaErrorInvalidValue;  // the plan takes slices by the widest accesses
    } else {
      if (plan.family == Family::kResident)
        return launch(batch_norm_resident_forward_kernel<T, v, map, ends>,
                      shape_of(plan, plan.teams), stream, call);
      return for_each_range(plan, [&](int64_t first, int64_t groups) {
        call.first_group = first;
        const LaunchShape shape = shape_of(plan, groups);
        cudaError_t error = cudaSuccess;
        if (is_training(problem.stage))
          error = launch(batch_norm_reduce_forward_kernel<T, v, map, ends>, shape, stream, call);
        if (error != cudaSuccess) return error;
        if (!problem.applies())
          return launch(batch_norm_finish_forward_kernel<T>, one_block_each(shape, groups), stream,
                        call);
        return launch(batch_norm_apply_forward_kernel<T, v, map, ends>, shape, stream, call);
      });
    }
  });
}

template cudaError_t launch_as<BNEXT_TYPE>(const CudaPlan&, const Problem&, const ForwardArgs&,
                                           void*, void*);

}  // namespace bnext
