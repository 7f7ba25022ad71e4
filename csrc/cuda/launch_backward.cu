// Launches the backward kernels for one dtype, BNEXT_TYPE; setup.py compiles this file for each.
#include "backward.cuh"
#include "launch.cuh"

namespace bnext {

template <class T>
cudaError_t launch_as(const CudaPlan& plan, const Problem& problem, const BackwardArgs& args,
                      void* workspace, void* stream) {
  BackwardCall call{problem, plan, args, workspace, 0};
  const bool frozen = !args.save_stats;
  return with_items<T>(plan, [&](auto vector, auto map) {
    if (plan.family == Family::kResident)
      return launch(batch_norm_resident_backward_kernel<T, vector, map>, shape_of(plan, plan.teams),
                    stream, call);
    return for_each_range(plan, [&](int64_t first, int64_t groups) {
      call.first_group = first;
      const bool sums = !frozen || problem.need_params;
      cudaError_t error = cudaSuccess;
      if (sums)
        error = launch(batch_norm_reduce_backward_kernel<T, vector, map>, shape_of(plan, groups),
                       stream, call);
      if (error != cudaSuccess) return error;
      if (sums && (frozen || !problem.applies())) {
        LaunchShape one_block_each = shape_of(plan, groups);
        one_block_each.blocks = groups;
        return launch(batch_norm_finish_backward_kernel<T>, one_block_each, stream, call);
      }
      return launch(batch_norm_apply_backward_kernel<T, vector, map>, shape_of(plan, groups),
                    stream, call);
    });
  });
}

template cudaError_t launch_as<BNEXT_TYPE>(const CudaPlan&, const Problem&, const BackwardArgs&,
                                           void*, void*);

}  // namespace bnext
