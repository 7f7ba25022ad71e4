// Launches the forward kernels for one dtype, BNEXT_TYPE; setup.py compiles this file for each.
#include "forward.cuh"
#include "launch.cuh"

namespace bnext {

template <class T>
cudaError_t launch_as(const CudaPlan& plan, const Problem& problem, const ForwardArgs& args,
                      void* workspace, void* stream) {
  ForwardCall call{problem, plan, args, workspace, 0};
  return with_items<T>(plan, [&](auto vector, auto map) {
    if (plan.family == Family::kResident)
      return launch(batch_norm_resident_forward_kernel<T, vector, map>, shape_of(plan, plan.teams),
                    stream, call);
    return for_each_range(plan, [&](int64_t first, int64_t groups) {
      call.first_group = first;
      cudaError_t error = cudaSuccess;
      if (is_training(problem.stage))
        error = launch(batch_norm_reduce_forward_kernel<T, vector, map>, shape_of(plan, groups),
                       stream, call);
      if (error == cudaSuccess)
        error = launch(batch_norm_apply_forward_kernel<T, vector, map>, shape_of(plan, groups),
                       stream, call);
      return error;
    });
  });
}

template cudaError_t launch_as<BNEXT_TYPE>(const CudaPlan&, const Problem&, const ForwardArgs&,
                                           void*, void*);

}  // namespace bnext
