// Launches the backward kernels for one dtype, BNEXT_TYPE; setup.py compiles this file for each.
#include "backward.cuh"
#include "launch.cuh"

namespace bnext {

template <class T>
cudaError_t launch_as(const CudaPlan& plan, const Problem& problem, const BackwardArgs& args,
                      void* workspace, void* stream) {
  BackwardCall call{problem, plan, args, workspace, 0};
  const bool frozen = !args.save_stats;
  return with_items<T>(plan, [&](auto v, auto map, auto ends) {
    constexpr bool kSliced = is_sliced(map, ends);
    const bool is_resident = plan.family == Family::kResident;
    const bool may_share = is_shared<v, map, ends> && !(is_resident && kSliced);  // see plan.cpp
    if (!may_share && !has_gate_of_its_own(problem)) return cudaErrorInvalidValue;
    if (is_resident) {
      if constexpr (kSliced && !Loops<T, v, map>::kAlone)
        return cudaErrorInvalidValue;
      else
        return launch(batch_norm_resident_backward_kernel<T, v, map, ends>,
                      shape_of(plan, plan.teams), stream, call);
    }
    return for_each_range(plan, [&](int64_t first, int64_t groups) {
      call.first_group = first;
      const LaunchShape shape = shape_of(plan, groups);
      const bool sums = is_training(problem.stage) || problem.need_params;
      // Frozen, all but slices have dx from the reduction.
      const bool applies = problem.applies() && !(sums && frozen && !kSliced);
      cudaError_t error = cudaSuccess;
      if (sums)
        error = launch(batch_norm_reduce_backward_kernel<T, v, map, ends>, shape, stream, call);
      if (error == cudaSuccess && sums && (frozen || !applies))
        error = launch(batch_norm_finish_backward_kernel<T>, one_block_each(shape, groups), stream,
                       call);
      if (error != cudaSuccess || !applies) return error;
      return launch(frozen ? batch_norm_apply_backward_kernel<T, v, map, ends, true>
                           : batch_norm_apply_backward_kernel<T, v, map, ends, false>,
                    shape, stream, call);
    });
  });
}

template cudaError_t launch_as<BNEXT_TYPE>(const CudaPlan&, const Problem&, const BackwardArgs&,
                                           void*, void*);

}  // namespace bnext
