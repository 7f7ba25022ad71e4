// Launches the backward kernels for one dtype, BNEXT_TYPE; setup.py compiles this file for each.
#include "backward.cuh"
#include "launch.cuh"

namespace bnext {

// f(gate). kAlone: what has a gate of its own gets it; kMasks: a mask too.
template <bool kAlone, bool kMasks, bool kShared, class F>
inline cudaError_t with_gate(const Problem& p, const F& f) {
  const bool is_alone = has_gate_of_its_own(p);
  if constexpr (kMasks)
    if (is_alone && p.has_mask) return f(Constant<Gate::kMask>{});
  if constexpr (kAlone)
    if (is_alone && !p.has_mask)
      return p.act == Act::kNone ? f(Constant<Gate::kNone>{}) : f(Constant<Gate::kSign>{});
  if constexpr (kShared) return f(Constant<Gate::kAny>{});
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t launch_as(const CudaPlan& plan, const Problem& problem, const BackwardArgs& args,
                      void* workspace, void* stream) {
  BackwardCall call{problem, plan, args, workspace, 0};
  const bool frozen = !args.save_stats;
  return with_items<T>(plan, [&](auto v, auto map, auto ends) {
    constexpr bool kMasks = is_widest<T>(v), kAlone = kMasks || is_half_as_wide<T>(v, map);
    return with_gate<kAlone, kMasks, v <= kMaxSharedBackwardVector>(problem, [&](auto gate) {
      constexpr bool kSliced = is_sliced(map, ends);
      if (plan.family == Family::kResident) {
        if constexpr (kSliced && gate == Gate::kAny)
          return cudaErrorInvalidValue;  // see plan.cpp
        else
          return launch(batch_norm_resident_backward_kernel<T, v, map, ends, gate>,
                        shape_of(plan, plan.teams), stream, call);
      }
      return for_each_range(plan, [&](int64_t first, int64_t groups) {
        call.first_group = first;
        const LaunchShape shape = shape_of(plan, groups);
        const bool sums = is_training(problem.stage) || problem.need_params;
        cudaError_t error = cudaSuccess;
        bool applies = problem.applies();
        if (sums) {
          auto* reduce = batch_norm_reduce_backward_kernel<T, v, map, ends, gate, false>;
          if constexpr (!kSliced)
            if (frozen) {
              reduce = batch_norm_reduce_backward_kernel<T, v, map, ends, gate, true>;
              applies = false;  // it has
            }
          error = launch(reduce, shape, stream, call);
          if (error == cudaSuccess && (frozen || !applies))
            error = launch(batch_norm_finish_backward_kernel<T>, one_block_each(shape, groups),
                           stream, call);
        }
        if (error != cudaSuccess || !applies) return error;
        return launch(frozen ? batch_norm_apply_backward_kernel<T, v, map, ends, gate, true>
                             : batch_norm_apply_backward_kernel<T, v, map, ends, gate, false>,
                      shape, stream, call);
      });
    });
  });
}

template cudaError_t launch_as<BNEXT_TYPE>(const CudaPlan&, const Problem&, const BackwardArgs&,
                                           void*, void*);

}  // namespace bnext
