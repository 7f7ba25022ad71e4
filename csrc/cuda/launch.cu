// The launchers, by dtype; the kernels that count a batch and join processes.
#include "elements.cuh"
#include "launch.cuh"

namespace bnext {
namespace {

__global__ void count_kernel(int64_t* num_batches_tracked) {
  if (threadIdx.x == 0) ++*num_batches_tracked;
}

// A thread a channel.
__global__ void join_kernel(const __grid_constant__ JoinArgs args) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= args.c) return;
  const Joined j = join(args, c);
  const bool any = j.count > 0;
  args.save_stats[c] = j.mean;
  args.save_stats[args.c + c] = any ? inverse_std(j.m2 / j.count, args.eps) : 0;
  args.save_stats[2 * args.c + c] = j.low;
  if (!any) return;  // counted, but there is nothing to learn from
  double factor = args.momentum;
  if (args.cumulative)
    factor = args.num_batches_tracked ? 1 / static_cast<double>(*args.num_batches_tracked) : 0;
  move_running(args.running_mean, c, factor, j.mean);
  move_running(args.running_var, c, factor, j.m2 / (j.count - 1));
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

bool is_refused_launch(int error) {
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorInvalidClusterSize ||
         error == cudaErrorLaunchOutOfResources;
}

int launch_join(const JoinArgs& args, void* stream) {
  if (args.c == 0) return cudaSuccess;
  constexpr int kThreads = 4 * kWarpThreads;
  return launch(join_kernel, {ceil_div(args.c, kThreads), kThreads, 0}, stream, args);
}

int launch_count(int64_t* num_batches_tracked, void* stream) {
  return launch(count_kernel, {1, kWarpThreads, 0}, stream, num_batches_tracked);
}

}  // namespace bnext
