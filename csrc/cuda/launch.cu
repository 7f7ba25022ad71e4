// The launchers, by dtype; the kernel that counts a batch.
#include "launch.cuh"

namespace bnext {
namespace {

__global__ void count_kernel(int64_t* num_batches_tracked) {
  if (threadIdx.x == 0) ++*num_batches_tracked;
}

}  // namespace

int launch(const CudaPlan& plan, const Problem& problem, const ForwardArgs& args, void* workspace,
           void* stream) {
  return visit_dtype<bfloat16, float16>(problem.dtype, [&](auto t) {
    return launch_as<decltype(t)>(plan, problem, args, workspace, stream);
  });
}

int launch(const CudaPlan& plan, const Problem& problem, const BackwardArgs& args, void* workspace,
           void* stream) {
  return visit_dtype<bfloat16, float16>(problem.dtype, [&](auto t) {
    return launch_as<decltype(t)>(plan, problem, args, workspace, stream);
  });
}

int launch(const CudaPlan& plan, const Problem& problem, const DoubleBackwardArgs& args,
           void* workspace, void* stream) {
  return visit_dtype<bfloat16, float16>(problem.dtype, [&](auto t) {
    return launch_as<decltype(t)>(plan, problem, args, workspace, stream);
  });
}

int launch_count(int64_t* num_batches_tracked, void* stream) {
  return launch(count_kernel, {1, kWarpThreads, 0}, stream, num_batches_tracked);
}

}  // namespace bnext
