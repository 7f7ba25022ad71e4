// Launches the forward kernels for one dtype, BNEXT_TYPE; setup.py compiles this file for each.
#include "forward.cuh"
#include "launch.cuh"

namespace bnext {

// f(what is fused, whether a residual is added). kAlone: what has kernels of its own gets them;
// kMasks: those that write a mask too. kMasked: there is one.
template <bool kAlone, bool kMasks, bool kMasked, class F>
inline cudaError_t with_fused(const Problem& p, const F& f) {
  const auto with = [&](auto fused) {
    if constexpr (!kMasked)
      if (!p.residual) return f(fused, Constant<false>{});
    return f(fused, Constant<true>{});
  };
  if constexpr (kAlone) {
    if (p.act == Act::kNone) return with(Constant<Fused::kNone>{});
    if (p.act == Act::kRelu && !p.residual) return f(Constant<Fused::kRelu>{}, Constant<false>{});
  }
  if constexpr (kMasks)
    if (p.act == Act::kRelu) return f(Constant<Fused::kRelu>{}, Constant<true>{});
  return with(Constant<Fused::kAny>{});
}

template <class T>
cudaError_t launch_as(const CudaPlan& plan, const Problem& problem, const ForwardArgs& args,
                      void* workspace, void* stream) {
  ForwardCall call{problem, plan, args, workspace, 0};
  return with_items<T>(plan, [&](auto v, auto map, auto ends) {
    constexpr bool kMasks = is_widest<T>(v), kAlone = kMasks || is_half_as_wide<T>(v, map);
    constexpr bool kMasked = v == 1 && ends == Ends::kRagged;
    constexpr bool kSliced = is_sliced(map, ends);
    if constexpr (kSliced && v > 1 && !kMasks) {
      return cudaErrorInvalidValue;  // the plan takes slices by the widest accesses
    } else {
      return with_fused<kAlone, kMasks, kMasked>(problem, [&](auto fused, auto residual) {
        if (plan.family == Family::kResident)
          return launch(batch_norm_resident_forward_kernel<T, v, map, ends, fused, residual>,
                        shape_of(plan, plan.teams), stream, call);
        return for_each_range(plan, [&](int64_t first, int64_t groups) {
          call.first_group = first;
          const LaunchShape shape = shape_of(plan, groups);
          cudaError_t error = cudaSuccess;
          if (is_training(problem.stage))
            error = launch(batch_norm_reduce_forward_kernel<T, v, map, ends>, shape, stream, call);
          if (error != cudaSuccess) return error;
          if (!problem.applies())
            return launch(batch_norm_finish_forward_kernel<T>, one_block_each(shape, groups),
                          stream, call);
          return launch(batch_norm_apply_forward_kernel<T, v, map, ends, fused, residual>, shape,
                        stream, call);
        });
      });
    }
  });
}

template cudaError_t launch_as<BNEXT_TYPE>(const CudaPlan&, const Problem&, const ForwardArgs&,
                                           void*, void*);

}  // namespace bnext
