// The launchers, by dtype; the kernel that counts a batch.
#include "launch.cuh"

namespace bnext {
namespace {

__global__ void count_kernel(int64_t* num_batches_tracked) {
  if (threadIdx.x == 0) ++*num_batches_tracked;
}

template <class F>
cudaError_t with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(bfloat16{});
    case DType::kFloat16:
      return f(float16{});
    default:
      return f(float{});
  }
}

}  // namespace

int launch_forward(const CudaPlan& plan, const Problem& problem, const ForwardArgs& args,
                   void* workspace, void* stream) {
  cudaError_t error = cudaSuccess;
  // The cumulative average needs the new count on every block: a launch of its own raises it.
  if (args.num_batches_tracked && args.cumulative)
    error = launch(count_kernel, {1, kWarpThreads, 0}, stream, args.num_batches_tracked);
  if (error == cudaSuccess)
    error = with_dtype(problem.dtype, [&](auto t) {
      return launch_forward_as<decltype(t)>(plan, problem, args, workspace, stream);
    });
  return error;
}

int launch_backward(const CudaPlan& plan, const Problem& problem, const BackwardArgs& args,
                    void* workspace, void* stream) {
  return with_dtype(problem.dtype, [&](auto t) {
    return launch_backward_as<decltype(t)>(plan, problem, args, workspace, stream);
  });
}

int launch_count(int64_t* num_batches_tracked, void* stream) {
  return launch(count_kernel, {1, kWarpThreads, 0}, stream, num_batches_tracked);
}

}  // namespace bnext
